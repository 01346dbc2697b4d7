"""`Score`: what one reward function thinks of one completion, and why; `Counters`: what it counts while it does so;
`TrainerState`: how far the training is.

A reward function may return plain floats (TRL's signature); the built-in ones return `Score`, so that every decision
can be read later: what was extracted, what it was compared with, and which rule decided.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Completion = str | Sequence[Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Score:
    """The verdict of one reward function on one completion.

    value: the reward, or None when the function does not apply to this row or could not decide (masked, never 0).
    reason: one sentence for a reader. extracted: the answer as taken from the text. gold: the reference as understood.
    rule: short name of the rule that decided, for counting.

    >>> Score(1.0, "equal numbers", extracted="1,000", gold="1000", rule="number").value
    1.0
    """

    value: float | None
    reason: str = ""
    extracted: str | None = None
    gold: str | None = None
    rule: str = ""

    @property
    def explanation(self) -> dict[str, str | None]:
        """What is logged beside the value: the fields `extracted`, `gold`, `rule` and `reason`."""
        return {"extracted": self.extracted, "gold": self.gold, "rule": self.rule, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class TrainerState:
    """How far the training is, for a function with an argument `trainer_state`; the names are those of TRL's, which has
    more. global_step: GRPO steps that are done, 0 in the first one. max_steps: all steps of the run."""

    global_step: int = 0
    max_steps: int = 1


class Counters:
    """What a function counts by itself (calls, cost). One that has an argument `counters` gets the one of its entry,
    and what it adds is logged as `rewards/<name>/<key>`, summed. Safe to share between threads.

    >>> counters = Counters()
    >>> counters.add(calls=1); counters.add(calls=2, cost_usd=0.5)
    >>> counters.take(), counters.take()
    ({'calls': 3, 'cost_usd': 0.5}, {})
    """

    def __init__(self) -> None:
        self._amounts: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        with self._lock:
            for key, amount in amounts.items():
                self._amounts[key] = self._amounts.get(key, 0) + amount

    def take(self) -> dict[str, float]:
        """What was added since the last time."""
        with self._lock:
            taken, self._amounts = self._amounts, {}
        return taken


def completion_text(completion: Completion) -> str:
    """The text of a completion: itself when it is a str, else the joined `content` of the messages of TRL's
    conversational form. A message whose content is a list of parts gives its text parts. Anything else gives "".

    >>> completion_text([{"role": "assistant", "content": "<answer>4</answer>"}])
    '<answer>4</answer>'
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence):
        return ""
    pieces: list[str] = []
    for message in completion:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            pieces.append(content)
        elif isinstance(content, Sequence):
            parts = (part.get("text") for part in content if isinstance(part, Mapping))
            pieces.extend(text for text in parts if isinstance(text, str))
    return "".join(pieces)
