"""Learning rates, by hand."""

from __future__ import annotations

import pytest

from rl.config import OptimizerSection
from rl.train.schedule import learning_rate_at


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_warm_up_then_course(kind: str, expected: list[float]) -> None:
    section = OptimizerSection(learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=2)  # type: ignore[arg-type]
    assert [learning_rate_at(section, step, 6) for step in range(6)] == pytest.approx(expected)
    assert learning_rate_at(section, 10, 6) <= expected[-1]
