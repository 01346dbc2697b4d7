"""An engine that says what it is told to, for tests whose numbers are worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from rl.config import GeneratedTokenizer
from rl.data import build_tokenizer
from rl.types import Completion, RolloutGroup, RolloutRequest, SamplingParams

TOKENIZER = build_tokenizer(GeneratedTokenizer(type="characters", alphabet="0123456789./ abcdefghij"))


class Spoken:
    """texts: what is said to each problem (by id), in the order of its seeds; a greedy request takes the first."""

    def __init__(self, texts: Mapping[str, Sequence[str]]) -> None:
        self.texts = texts
        self.params: list[SamplingParams] = []

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        *,
        on_group: Callable[[int, RolloutGroup], None] | None = None,
    ) -> list[RolloutGroup]:
        self.params.append(params)
        groups = []
        for i, request in enumerate(requests):
            completions = []
            for text in self.texts[request.problem.id][: len(request.seeds)]:
                ids = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
                completions.append(Completion(ids, torch.zeros(len(ids)), "stop"))
            groups.append(RolloutGroup(request.problem, completions))
            if on_group:
                on_group(i, groups[-1])
        return groups


def answered(answer: str) -> str:
    """A well-formed completion that states `answer`."""
    return f"<think>a</think><answer>{answer}</answer>"
