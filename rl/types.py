"""The carriers that travel from a dataset row to its gradient, and the shape legend.

    B  problems in a step              L  layers (Lm of them MoE, counted from the first MoE layer)
    G  completions per problem         D  model width, H heads
    N  rows, B * G                     C  latent (KV compression) rank, R  RoPE dimensions of a head
    T  positions, V vocabulary         E  routed experts, K  experts per token

A per-token array describes the token at the same index: `logprobs[t] = log p(token_t | tokens_<t)`.

Worked example. The prompt `[5, 6, 7]` was sampled with G = 2. One completion is `[8, 2]` where 2 is the stop token:
`token_ids == [8, 2]`, `logprobs` has 2 entries, and since the last token is never fed back to the model, 3 + 2 - 1 = 4
tokens passed through the experts: `prompt_routes` has 3 rows (shared by the group), `routes` has 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One dataset row, ready to be sampled.

    id: unique within its dataset and stable between runs. prompt: the text that was tokenised. prompt_ids: its tokens.
    columns: every column of the row; reward functions get these.
    """

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw. temperature 0 means greedy. top_p = 1, top_k = 0, min_p = 0 are off (training samples the full
    distribution; only evaluation may cut it). A completion ends with (and keeps) the first of `stop_token_ids`, or when
    its text contains one of `stop_strings`, or after `max_completion_length` tokens."""

    max_completion_length: int
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Sample `len(seeds)` completions of `problem`; completion k depends on the weights, the prompt and `seeds[k]`
    only."""

    problem: Problem
    seeds: tuple[int, ...]


@dataclass(slots=True)
class Completion:
    """token_ids: T sampled tokens, the stop token included. logprobs: (T,) float32, log-probability of each under the
    distribution that was actually sampled (after temperature and truncation; for greedy, of the untempered softmax).
    finish_reason: "stop" or "length" (truncated). routes: (T - 1, Lm, K) uint8 (int16 when E > 256), the experts that
    each token but the last went through when it was fed to the model; None for a policy without experts."""

    token_ids: list[int]
    logprobs: torch.Tensor
    finish_reason: FinishReason
    routes: torch.Tensor | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(slots=True)
class RolloutGroup:
    """All completions of one problem. prompt_routes: (P, Lm, K) for the P prompt tokens, shared by the group, or
    None."""

    problem: Problem
    completions: list[Completion]
    prompt_routes: torch.Tensor | None = None


class RolloutEngine(Protocol):
    """What the trainer samples with. `generate` returns one group per request, in the order of the requests, and calls
    `on_group` with each group as soon as its last completion has ended (so rewards can be scored meanwhile)."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        *,
        on_group: Callable[[int, RolloutGroup], None] | None = None,
    ) -> list[RolloutGroup]: ...
