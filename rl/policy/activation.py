"""The gated activation silu(gate) * up, for the experts with the expert's weight folded in.

One autograd node that keeps only its inputs and recomputes silu in the backward pass: half the memory of the composed
form. On CUDA each pass is one Triton kernel where Triton is installed (it comes with torch's CUDA builds).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

try:
    from rl.policy import kernels
except ImportError:  # torch without CUDA comes without triton
    kernels = None  # type: ignore[assignment]


def gated_silu(gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """gate_up: (M, 2I), the gate in the first half; weights: (M,) float32 -> silu(gate) * up * weight: (M, I)."""
    return _GatedSilu.apply(gate_up, weights)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up: (M, I) -> silu(gate) * up: (M, I)."""
    return _SiluMul.apply(gate, up) if kernels is not None and gate.is_cuda else F.silu(gate) * up


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weights)
        gate, up = gate_up.chunk(2, dim=-1)
        if kernels is not None and gate_up.is_cuda:
            return kernels.gated_silu_forward(gate, up, weights)
        return F.silu(gate).mul_(up).mul_(weights.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, weights = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        if kernels is not None and gate_up.is_cuda:
            grad_weights = kernels.gated_silu_backward(grad, gate, up, weights, grad_gate, grad_up)
            assert grad_weights is not None
            return grad_gate_up, grad_weights
        silu = F.silu(gate)
        grad_weights = torch.linalg.vecdot(grad.float(), (silu * up).float())
        grad = grad * weights.unsqueeze(-1).to(grad.dtype)
        torch.mul(grad, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        return grad_gate_up, grad_weights


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return kernels.gated_silu_forward(gate, up, None)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        kernels.gated_silu_backward(grad, gate, up, None, grad_gate, grad_up)
        return grad_gate, grad_up
