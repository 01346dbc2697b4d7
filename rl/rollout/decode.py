"""One decode step: every row's last token goes through the policy once and its next token is drawn.

MLA in its absorbed form (arXiv:2405.04434, section 2.1.2; see rl.policy.mla for the algebra), experts as the router
of the policy chooses them. `TorchStepper` is the plain form, for any device; `rl.rollout.cuda` has the
Triton kernels behind the same protocol. Nothing here waits for the device or reads a clock or torch's RNG.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F

from rl.rollout import ops
from rl.rollout.cache import LatentCache
from rl.rollout.native import library, step
from rl.rollout.ops import AttentionPlan
from rl.rollout.prefill import LeanPrefill
from rl.rollout.sampling import Sampler
from rl.rollout.state import PlanBuilder, RowState
from rl.rollout.weights import DecodeWeights, LayerWeights, build_decode_weights, halves_to_pairs


class Stepper(Protocol):
    """A rollout's decode steps on some device. name: for the statistics. derived_bytes, build_s: size of weight-derived
    buffers and time to build them."""

    name: str
    derived_bytes: int
    build_s: float

    def column_order(self) -> torch.Tensor | None:
        """How the columns of the policy's cache rows are reordered for this stepper's cache; None: as they are."""

    def lean_prefill(self, routes_dtype: torch.dtype) -> LeanPrefill | None:
        """A quicker way for few prompt tokens that returns experts' numbers as `routes_dtype`; None: there is none."""

    def draw(
        self, sampler: Sampler, logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (n, V), seeds and steps (n,) int64 -> token (n,) int64, logprob (n,) float32."""

    def regroup(self, prompt_slots: list[int], prompt_lens: list[int]) -> None:
        """Rows came, went or moved: row r reads prompt slot prompt_slots[r] of prompt_lens[r] tokens."""

    def extra_stats(self) -> dict[str, float | int]:
        """What else `Engine.stats` should say."""

    def advance(self, steps: int, longest_own: int) -> None:
        """`steps` decode steps of all rows, in place; longest_own: own tokens of the longest row after the first."""


class TorchStepper:
    """Plain torch, on any device. row_multiple: rows are padded to a multiple of this with rows that stand still."""

    def __init__(
        self, policy: Any, cache: LatentCache, state: RowState, sampler: Sampler, *, positions: int, row_multiple: int
    ) -> None:
        self._decoder = TorchDecoder(policy, positions=positions)
        self.name = "torch" if self._decoder.native is None else "native"
        self.derived_bytes, self.build_s = self._decoder.weights.derived_bytes, self._decoder.weights.build_s
        self._cache, self._state, self._sampler, self._row_multiple = cache, state, sampler, row_multiple
        self._plans = PlanBuilder(state, cache)

    def column_order(self) -> torch.Tensor:
        return self._decoder.column_order()

    def lean_prefill(self, routes_dtype: torch.dtype) -> None:
        """The policy's forward takes all prompts."""

    def draw(
        self, sampler: Sampler, logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        native = self._decoder.native
        if native is None or sampler.truncates:
            return sampler(logits, seeds, steps)
        return native.draw(logits, seeds, steps, sampler.temperature)

    def regroup(self, prompt_slots: list[int], prompt_lens: list[int]) -> None:
        rows = len(prompt_slots)
        padded = max(-(-rows // self._row_multiple) * self._row_multiple, ops.MIN_MATMUL_ROWS)
        extra = min(padded, self._state.slots) - rows
        self._plans.regroup(prompt_slots + prompt_slots[:1] * extra, prompt_lens + prompt_lens[:1] * extra)

    def extra_stats(self) -> dict[str, float | int]:
        return {}

    def advance(self, steps: int, longest_own: int) -> None:
        state = self._state
        for longest in range(longest_own, longest_own + steps):
            plan = self._plans.plan(longest, masks=self._decoder.native is None)
            logits = self._decoder.logits(self._cache, state, plan)
            tokens, logprobs = self.draw(self._sampler, logits, state.seed[: logits.shape[0]], plan.own_len)
            state.record(plan.slot, tokens, logprobs)


class TorchDecoder:
    """policy: rl.policy.model.Policy, read now; positions: longest prompt + completion."""

    def __init__(self, policy: Any, *, positions: int) -> None:
        self.weights = build_decode_weights(policy, positions=positions)
        self.native = library.load() if step.takes(self.weights) else None
        if self.native is not None:
            step.pack(self.native, self.weights)

    def column_order(self) -> torch.Tensor:
        rank, device = self.weights.latent_rank, self.weights.turns.device
        return torch.cat((torch.arange(rank, device=device), rank + halves_to_pairs(self.weights.rope_dims, device)))

    def logits(self, cache: LatentCache, state: RowState, plan: AttentionPlan) -> torch.Tensor:
        tokens = state.token[: plan.slot.shape[0]]
        positions = plan.prompt_len + plan.own_len - 1
        if self.native is None:
            hidden, routes = hidden_states(self.weights, cache, tokens, positions, plan)
        else:
            hidden, routes = step.hidden_states(self.native, self.weights, cache, tokens, positions, plan)
        if routes is not None:
            assert state.out_routes is not None
            place = plan.slot * state.limit + plan.own_len - 1
            state.out_routes.flatten(0, 1).index_copy_(0, place, routes.to(state.out_routes.dtype))
        return F.linear(hidden, self.weights.head)


def hidden_states(
    weights: DecodeWeights, cache: LatentCache, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """tokens (n,) at positions (n,) -> normed hidden (n, D) and the experts used (n, Lm, K) or None; writes the
    cache."""
    x = F.embedding(tokens, weights.embed)
    turns = weights.turns.index_select(0, positions)
    place = plan.own_len - 1
    used: list[torch.Tensor] = []
    for layer, own, prompt in zip(weights.layers, cache.own, cache.prompt, strict=True):
        x = _attend(x, layer, weights, own, prompt, turns, place, plan)
        x, experts = _feed_forward(x, layer)
        if experts is not None:
            used.append(experts)
    hidden = ops.rms_norm(x, weights.norm.weight, weights.norm.eps)
    return hidden, torch.stack(used, dim=1) if used else None


def _attend(
    x: torch.Tensor,
    layer: LayerWeights,
    weights: DecodeWeights,
    own: torch.Tensor,
    prompt: torch.Tensor,
    turns: torch.Tensor,
    place: torch.Tensor,
    plan: AttentionPlan,
) -> torch.Tensor:
    """x (n, D) -> x + attention(norm(x)); writes the rows' new cache rows first."""
    rank = weights.latent_rank
    normed = ops.rms_norm(x, layer.attention_norm.weight, layer.attention_norm.eps)
    joined = F.linear(normed, layer.joined, layer.joined_bias)
    query, latent = joined[:, : -weights.width], joined[:, -weights.width :]
    ops.write_latent(latent, layer.latent_norm.weight, layer.latent_norm.eps, turns, own, plan.slot, place)
    if layer.query is not None:
        assert layer.query_norm is not None
        query = F.linear(ops.rms_norm(query, layer.query_norm.weight, layer.query_norm.eps), layer.query)
    query = query.unflatten(-1, (weights.heads, -1))
    ops.rotate(query[..., -weights.rope_dims :], turns)
    if layer.absorb_k is not None:
        nope = query[..., : -weights.rope_dims].transpose(0, 1)
        absorbed = torch.bmm(nope, layer.absorb_k).transpose(0, 1)
        query = torch.cat((absorbed, query[..., -weights.rope_dims :]), dim=-1)
    context = ops.attention(query, own, prompt, plan, weights.scale, rank)
    if layer.absorb_v is not None:
        context = torch.bmm(context.transpose(0, 1), layer.absorb_v).transpose(0, 1)
    context = context.reshape(x.shape[0], -1)
    if layer.output_bias is not None:
        x = x + layer.output_bias
    return torch.addmm(x, context, layer.output.t())


def _feed_forward(x: torch.Tensor, layer: LayerWeights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (n, D) -> x + mlp(norm(x)), and the experts used (n, K) or None for a dense layer."""
    normed = ops.rms_norm(x, layer.mlp_norm.weight, layer.mlp_norm.eps)
    chosen = None
    if layer.router is not None:
        assert layer.expert_gate_up is not None and layer.expert_down is not None
        chosen, mix = layer.router(normed)
        experts = ops.experts_by_rows if x.device.type == "cpu" else ops.experts_grouped
        x = x + experts(normed, chosen, mix, layer.expert_gate_up, layer.expert_down)
    if layer.dense_gate_up is not None:
        assert layer.dense_down is not None
        x = torch.addmm(x, ops.silu_mul(F.linear(normed, layer.dense_gate_up)), layer.dense_down.t())
    return x, chosen
