"""A digest of what is trained on, which a checkpoint remembers: the order of a run's data is drawn from the number of
rows, so a file that grew or changed would make another run of a resumed one, silently."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from rl.data.sft_rows import SFTRow
from rl.types import Problem


def fingerprint(rows: Iterable[Problem | SFTRow]) -> str:
    """16 hexadecimal digits: equal for the same prompts, answers (or completions) and ids in the same order."""
    digest = hashlib.sha256()
    for row in rows:
        if isinstance(row, Problem):
            told: tuple[object, ...] = (row.id, row.prompt_ids, row.columns.get("answer"))
        else:
            told = (row.token_ids, row.loss_mask)
        digest.update(repr(told).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:16]
