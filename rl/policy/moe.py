"""Mixture of experts: router, experts, and the bias that balances load without an auxiliary loss.

Papers: DeepSeekMoE (arXiv:2401.06066), DeepSeek-V2 (2405.04434, group-limited routing), DeepSeek-V3 (2412.19437,
sigmoid scores with a selection bias; 2408.15664 for the bias update).

In: tokens (T, D). Out: (T, D) and the experts used (T, K). With `routes` given, those experts are used instead of the
router's own choice, while their weights still come from the live scores, so the router keeps its gradient.
The weight of an expert is multiplied into its activation instead of its output: the same sum, on fewer numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from rl.policy.activation import gated_silu, silu_mul
from rl.policy.config import PolicyConfig

try:
    from rl.policy import kernels
except ImportError:  # torch without CUDA comes without triton
    kernels = None  # type: ignore[assignment]


class Router(nn.Module):
    """Scores in fp32 whatever the dtype of the model; the selection bias is a buffer that stays fp32 through any cast
    (steps of 0.001 stall in bf16)."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None and config.num_experts_per_tok is not None
        self.num_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.num_groups, self.top_groups = config.n_group, config.topk_group
        self.sigmoid = config.scoring_func == "sigmoid"
        self.limit_groups = config.topk_method != "greedy" and self.top_groups < self.num_groups
        self.normalise = bool(config.norm_topk_prob)
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.e_score_correction_bias: torch.Tensor | None
        bias = torch.zeros(self.num_experts, dtype=torch.float32) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: torch.Tensor, routes: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (T, D), routes: (T, K) integers or None -> experts (T, K) int64, weights (T, K) float32."""
        logits = _Float32Linear.apply(x, self.weight)
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)
        experts = self.select(scores.detach()) if routes is None else routes.to(torch.int64)
        weights = scores.gather(1, experts)
        if self.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights if self.scaling == 1.0 else weights * self.scaling

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        """scores: (T, E) -> the K chosen experts (T, K) int64. A group counts by the sum of its two best biased scores
        (V3) or by its best score (V2); experts outside the best groups cannot be chosen."""
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        if self.limit_groups:
            grouped = scores.view(scores.shape[0], self.num_groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(-1) if self.sigmoid else grouped.amax(-1)
            kept = best.topk(self.top_groups, dim=-1, sorted=False).indices
            dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            scores = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).view_as(scores)
        return scores.topk(self.top_k, dim=-1, sorted=False).indices

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(device=moved.device)
        return self


class _Float32Linear(torch.autograd.Function):
    """x W^T in fp32 from bf16 inputs, keeping the bf16 inputs (not fp32 copies) for the backward pass. On CUDA the
    product reads bf16 and accumulates in fp32 (46 us instead of 421 for 32,768 tokens of 2,048 on an H200)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if x.is_cuda and x.dtype == weight.dtype != torch.float32:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad.t() @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def balanced_bias(bias: torch.Tensor, load: torch.Tensor, *, rate: float) -> torch.Tensor:
    """bias, load: (E,) -> bias + rate * sign(mean(load) - load): a new tensor (2412.19437, section 2.1.2; V3: 0.001).
    load: tokens that each expert got in the whole global batch, padding not counted."""
    load = load.to(torch.float32)
    return bias + rate * torch.sign(load.mean() - load)


def expert_load(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """experts: (..., K) -> (E,) float32, how often each was chosen. No device synchronisation."""
    chosen = experts.reshape(-1).to(torch.int64)
    ones = torch.ones_like(chosen, dtype=torch.float32)
    return torch.zeros(num_experts, device=experts.device).scatter_add_(0, chosen, ones)


class Experts(nn.Module):
    """All routed experts of a layer in two fused parameters: gate_up_proj (E, 2I, D), down_proj (E, D, I)."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None and config.moe_intermediate_size is not None
        self.num_experts = config.n_routed_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x: (T, D), experts: (T, K) int64, weights: (T, K) float32 -> sum_k weights[:, k] * expert_k(x): (T, D)."""
        if not grouped_mm_takes(self.gate_up_proj, self.down_proj):
            return experts_reference(x, experts, weights, self.gate_up_proj, self.down_proj)
        plan = dispatch(experts, self.num_experts)
        rows = _GatherRows.apply(x, plan.token_of_row, plan.row_of_slot)
        gate_up = _GroupedLinear.apply(rows, self.gate_up_proj, plan.offsets)
        inner = gated_silu(gate_up, weights.reshape(-1).index_select(0, plan.slot_of_row))
        outer = _GroupedLinear.apply(inner, self.down_proj, plan.offsets)
        return _SumRows.apply(outer, plan.token_of_row, plan.row_of_slot)


def experts_reference(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor
) -> torch.Tensor:
    """One expert after the other, over all tokens that chose it: slow and obvious. Shapes as in `Experts`."""
    out = torch.zeros_like(x)
    for expert in range(gate_up_proj.shape[0]):
        token, slot = torch.where(experts == expert)
        gate, up = F.linear(x[token], gate_up_proj[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_proj[expert])
        out = out.index_add(0, token, (y * weights[token, slot].unsqueeze(-1)).to(x.dtype))
    return out


class Dispatch(NamedTuple):
    """T * K rows, sorted by expert. slot_of_row: (T*K,) index into the flat (T, K) choices; token_of_row: (T*K,);
    row_of_slot: (T, K); offsets: (E,) int32, where each expert's rows end."""

    slot_of_row: torch.Tensor
    token_of_row: torch.Tensor
    row_of_slot: torch.Tensor
    offsets: torch.Tensor


def dispatch(experts: torch.Tensor, num_experts: int) -> Dispatch:
    """experts: (T, K) int64. Nothing is read on the host."""
    tokens, top_k = experts.shape
    narrow = torch.uint8 if num_experts <= 256 else torch.int16  # a radix sort reads fewer digits
    by_expert, slot_of_row = experts.reshape(-1).to(narrow).sort(stable=True)
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(tokens * top_k, device=experts.device)
    ids = torch.arange(num_experts, device=experts.device, dtype=narrow)
    offsets = torch.searchsorted(by_expert, ids, right=True, out_int32=True)
    return Dispatch(slot_of_row, slot_of_row // top_k, row_of_slot.view(tokens, top_k), offsets)


def _gather_rows(x: torch.Tensor, token_of_row: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, token_of_row)


def _sum_rows(rows: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    """(T*K, D) -> (T, D), the sum of each token's K rows; on CUDA in one kernel that accumulates in fp32."""
    if rows.is_cuda and kernels is not None:
        return kernels.sum_rows(rows, row_of_slot)
    if rows.is_cuda:
        return F.embedding_bag(row_of_slot, rows, mode="sum")
    return rows.index_select(0, row_of_slot.reshape(-1)).view(*row_of_slot.shape, -1).sum(dim=1)


class _GatherRows(torch.autograd.Function):
    """Each token's vector to each of its K rows. The backward pass sums by index instead of scatter-adding (which on
    CUDA is slow in bf16 and adds in random order)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token_of_row: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_of_slot)
        return _gather_rows(x, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_of_slot,) = ctx.saved_tensors
        return _sum_rows(grad, row_of_slot), None, None


class _SumRows(torch.autograd.Function):
    """The transpose of `_GatherRows`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, token_of_row: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token_of_row)
        return _sum_rows(rows, row_of_slot)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return _gather_rows(grad, token_of_row), None, None


class _GroupedLinear(torch.autograd.Function):
    """rows (M, K) sorted by expert, weight (E, N, K) -> (M, N). Saves the parameter itself, not a transposed view: a
    view would keep gathered experts alive under ZeRO-3."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        rows, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = F.grouped_mm(grad, weight, offs=offsets) if ctx.needs_input_grad[0] else None
        grad_weight = F.grouped_mm(grad.t(), rows, offs=offsets) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None


def grouped_mm_takes(*weights: torch.Tensor) -> bool:
    """grouped_mm knows fp32, bf16 and fp16, and wants strides of multiples of 16 bytes."""
    known = (torch.float32, torch.bfloat16, torch.float16)
    return all(w.dtype in known and all(n * w.element_size() % 16 == 0 for n in w.shape[1:]) for w in weights)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); the dense layers and the shared experts."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class MoE(nn.Module):
    """Routed experts plus shared ones that every token passes."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x: torch.Tensor, routes: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (T, D), routes: (T, K) or None -> (T, D), experts used (T, K) int64."""
        experts, weights = self.gate(x, routes)
        out = self.experts(x, experts, weights)
        return out if self.shared_experts is None else out + self.shared_experts(x), experts
