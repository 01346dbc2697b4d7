"""Rows of a rollout (or of a cold-start set) -> packed micro-batches.

A row is one prompt with one completion. Rows are concatenated without padding, so no token is wasted on the experts and
a micro-batch is simply "at most `max_tokens` tokens". The last token of a row is never fed (nothing is predicted from
it), so a row of P + T tokens takes P + T - 1 places, and `routes` (recorded while sampling) has exactly one entry per
place.

Per-token quantities of completions live in padded (n, T) matrices, n rows and T the longest completion of the
micro-batch: the loss is a function of such matrices (rl/grpo), which keeps its formulas as they are in the papers.

Example: rows with (P=2, T=3) and (P=1, T=2) give 4 + 2 places, cu_seqlens [0, 4, 6]; completion tokens are predicted
from places [1, 2, 3] and [4, 5]; `loss_mask` is [[1, 1, 1], [1, 1, 0]].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from rl.grpo.logprobs import completion_positions, shift

IDLE = -1  # number of a row that is none of the step's


@dataclass(slots=True)
class Row:
    """One prompt and completion. index: its number among all rows of the step (over all ranks). advantage: the whole
    completion's. sampling_logprobs: (T,) or None. routes: (P + T - 1, Lm, K) or None. trained: False masks every token
    (a truncated completion, or one without a reward)."""

    index: int
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    advantage: float = 0.0
    sampling_logprobs: torch.Tensor | None = None
    routes: torch.Tensor | None = None
    trained: bool = True

    @property
    def places(self) -> int:
        """Tokens that pass through the policy."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1


@dataclass(slots=True)
class MicroBatch:
    """tokens: (S,) int64 packed. targets: (M,) int64, the M completion tokens in row order. predict: (M,) int64, the
    place in `tokens` that predicts each target. cu_seqlens: (n + 1,) int32. loss_mask: (n, T) float32. advantages: (n,)
    float32. sampling_logprobs: (n, T) float32, zeros where padded, or None. old_logprobs, ref_logprobs: filled in by
    the trainer. routes: (S, Lm, K) int64 or None."""

    rows: list[Row]
    tokens: torch.Tensor
    targets: torch.Tensor
    predict: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    present: torch.Tensor
    loss_mask: torch.Tensor
    advantages: torch.Tensor
    sampling_logprobs: torch.Tensor | None = None
    routes: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = field(default=None)
    ref_logprobs: torch.Tensor | None = field(default=None)

    @property
    def idle(self) -> bool:
        """True for what `idle_micro_batch` makes: no row of the step."""
        return self.rows[0].index == IDLE

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """values: (M,) one per completion token -> (n, T), zeros where there is no token. Differentiable."""
        out = values.new_zeros(self.present.shape)
        return out.masked_scatter(self.present, values)


def pack_rows(rows: Sequence[Row], *, max_tokens: int, padded: bool = False) -> list[MicroBatch]:
    """Split `rows` into micro-batches of at most `max_tokens` places each (a longer row gets a micro-batch of its own).
    padded: every row takes as many places as the longest one beside it, as in a policy that computes on a padded grid.

    Rows of similar length go together; the order depends on lengths and row numbers only, so it repeats exactly."""
    ordered = sorted(rows, key=lambda row: (row.places, row.index))
    bins: list[list[Row]] = []
    used = 0
    for row in ordered:
        used = (len(bins[-1]) + 1) * row.places if padded and bins else used + row.places
        if not bins or used > max_tokens:
            bins.append([])
            used = row.places
        bins[-1].append(row)
    return [make_micro_batch(members) for members in bins]


def make_micro_batch(rows: Sequence[Row]) -> MicroBatch:
    """Pack `rows` (at least one; every completion has at least one token) into one micro-batch on CPU."""
    assert rows, "a micro-batch needs a row"
    prompts = torch.tensor([len(row.prompt_ids) for row in rows])
    completions = torch.tensor([len(row.completion_ids) for row in rows])
    assert int(prompts.min()) > 0 and int(completions.min()) > 0, "a row has an empty prompt or completion"
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), (prompts + completions).cumsum(0)])
    packed = shift(torch.tensor([t for row in rows for t in (*row.prompt_ids, *row.completion_ids)]), borders)
    predict = completion_positions(prompts, completions)
    present = torch.arange(int(completions.max())) < completions[:, None]
    trained = torch.tensor([row.trained for row in rows])
    return MicroBatch(
        rows=list(rows),
        tokens=packed.inputs,
        targets=packed.targets[predict],
        predict=predict,
        cu_seqlens=packed.cu_seqlens,
        max_seqlen=packed.max_seqlen,
        present=present,
        loss_mask=(present & trained[:, None]).float(),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        sampling_logprobs=_pad_sampling_logprobs(rows, present),
        routes=_join_routes(rows),
    )


def idle_micro_batch(like: MicroBatch) -> MicroBatch:
    """A micro-batch of one short row whose every token is masked: what a rank computes when it has run out of rows
    while others have not, so that collectives stay in step. It adds exactly zero to the loss and to every gradient."""
    row = like.rows[0]
    routes = None if like.routes is None or row.routes is None else row.routes[:1]
    logprobs = None if row.sampling_logprobs is None else row.sampling_logprobs[:1]
    idle = Row(
        index=IDLE,
        prompt_ids=row.prompt_ids[:1],
        completion_ids=row.completion_ids[:1],
        sampling_logprobs=logprobs,
        routes=routes,
        trained=False,
    )
    batch = make_micro_batch([idle])
    zeros = torch.zeros(1, 1)
    return replace(
        batch,
        old_logprobs=None if like.old_logprobs is None else zeros,
        ref_logprobs=None if like.ref_logprobs is None else zeros,
    )


def _pad_sampling_logprobs(rows: Sequence[Row], present: torch.Tensor) -> torch.Tensor | None:
    given = [row.sampling_logprobs for row in rows]
    if any(x is None for x in given):
        assert all(x is None for x in given), "either every row or none has sampling logprobs"
        return None
    out = torch.zeros(present.shape)
    for i, logprobs in enumerate(given):
        assert logprobs is not None
        out[i, : len(logprobs)] = logprobs
    return out


def _join_routes(rows: Sequence[Row]) -> torch.Tensor | None:
    given = [row.routes for row in rows]
    if any(x is None for x in given):
        assert all(x is None for x in given), "either every row or none has recorded routes"
        return None
    routes = torch.cat([x for x in given if x is not None]).to(torch.int64)
    assert len(routes) == sum(row.places for row in rows), "recorded routes do not cover the fed tokens"
    return routes
