"""Which recipe a run may be resumed with: the one it was started with, but for keys that leave its numbers alone.

Anything else would make one run of two, silently: half of the steps with one seed, group size or loss, half with
another. The keys that may differ are those of `MAY_CHANGE`, and the number of steps where no schedule was laid over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from rl.config.recipe import Recipe

Stage = Literal["sft", "grpo"]

# Keys, or whole sections, that a run may be resumed with differently: where it is written and under which name, what is
# shown and kept and how often, what memory it takes, and what happens after a fault.
MAY_CHANGE = (
    "name",
    "output_dir",
    "logging",
    "checkpoint",
    "eval.eval_steps",
    "eval.eval_on_start",
    "model.gradient_checkpointing",
    "rollout.max_batch_size",
    "rollout.cache_bytes",
    "optimizer.micro_batch_tokens",
    "optimizer.on_nonfinite",
    "sft.micro_batch_tokens",
    "sft.on_nonfinite",
    "sft.logging_steps",
    "rewards.on_error",
)
# What a cold start reads; it may go on whatever the other sections say meanwhile.
COLD_START_SECTIONS = ("seed", "model", "data", "sft")
_UNSET = "(not set)"


def changes_on_resume(saved: Recipe, given: Recipe, *, stage: Stage, steps_done: int) -> list[str]:
    """What `given` changes of `saved`, the recipe that a stage of a run was started with, one "key: old -> new" each.

    ValueError names every key that must not change on resume with both values, or the number of steps if the run has
    done more of them (`steps_done`) already.
    """
    allowed, refused = [], []
    for key, old, new in _differences(saved.model_dump(mode="json"), given.model_dump(mode="json")):
        if stage == "sft" and key.split(".")[0] not in COLD_START_SECTIONS:
            continue
        reason = _reason_against(key, new, saved, stage=stage, steps_done=steps_done)
        if reason is None:
            allowed.append(f"{key}: {_shown(old)} -> {_shown(new)}")
        else:
            refused.append(f"{key}: saved {_shown(old)}, given {_shown(new)}{reason}")
    if refused:
        raise ValueError(
            "another recipe than this run was started with; to resume it, give the saved values, to start another run, "
            "give another name or output_dir:\n" + "\n".join(f"  {text}" for text in refused)
        )
    return allowed


def _reason_against(key: str, new: Any, saved: Recipe, *, stage: Stage, steps_done: int) -> str | None:
    """None if `key` may change to `new`, else what there is to say about it beside the two values."""
    if key == f"{stage}.steps":
        schedule = saved.optimizer if stage == "grpo" or saved.sft is None else saved.sft
        if schedule.lr_scheduler_type != "constant":
            return f" (the {schedule.lr_scheduler_type} schedule of the learning rate was laid over the saved number)"
        return None if new >= steps_done else f" ({steps_done} are done already)"
    return None if any(key == entry or key.startswith(f"{entry}.") for entry in MAY_CHANGE) else ""


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path of the key, old value, new value) of everything that differs, mappings taken apart."""
    for key in dict.fromkeys((*old, *new)):
        was, now = old.get(key, _UNSET), new.get(key, _UNSET)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, f"{before}{key}.")
        elif was != now:
            yield f"{before}{key}", was, now


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
