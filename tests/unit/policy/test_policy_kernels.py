"""The Triton kernels of the policy, interpreted on the CPU, against plain torch: odd sizes, both layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rl.policy.rope import rotate

pytest.importorskip("triton.language")
ALLOWED = 1e-5


@pytest.fixture(scope="module")
def kernels() -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    from rl.policy import kernels as module

    if not isinstance(module._sum_rows, InterpretedFunction):
        pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; tests/gpu covers the kernels on a GPU")
    return module


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("heads", "nope", "rope", "value"), [(3, 12, 8, 20), (18, 8, 8, 16), (4, 16, 6, 10)])
@pytest.mark.parametrize("interleave", [True, False])
def test_assemble_heads(kernels: Any, heads: int, nope: int, rope: int, value: int, interleave: bool) -> None:
    tokens, width = 5, (max(nope + rope, value) + 7) // 8 * 8
    inputs = [draw(tokens, heads, nope + rope), draw(tokens, heads, nope + value), draw(tokens, rope)]
    inputs = [x.requires_grad_() for x in inputs]
    q, kv, k_rope = inputs
    tables = draw(tokens, rope // 2), draw(tokens, rope // 2) + 1
    got = kernels.AssembleHeads.apply(q, kv, k_rope, *tables, nope, width, interleave)
    wanted = [
        torch.cat((q[..., :nope], rotate(q[..., nope:], tables, interleave=interleave)), dim=-1),
        torch.cat((kv[..., :nope], k_rope.unsqueeze(1).expand(-1, heads, -1)), dim=-1),
        kv[..., nope:],
    ]
    wanted = [F.pad(x, (0, width - x.shape[-1])) for x in wanted]
    cotangents = [draw(tokens, heads, width) + i for i in range(3)]
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    gradients = (torch.autograd.grad(outputs, inputs, cotangents) for outputs in (got, wanted))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= ALLOWED


@pytest.mark.parametrize("shape", [(7, 24), (1, 130), (0, 8)])
@pytest.mark.parametrize("weighted", [True, False])
def test_gated_silu(kernels: Any, shape: tuple[int, int], weighted: bool) -> None:
    gate_up, weights, grad = draw(shape[0], 2 * shape[1]), draw(shape[0]), draw(*shape)
    reference = [gate_up.clone().requires_grad_(), weights.clone().requires_grad_()]
    gate, up = reference[0].chunk(2, dim=-1)
    wanted = F.silu(gate) * up * (reference[1].unsqueeze(-1) if weighted else 1.0)
    wanted.backward(grad)
    gate, up = gate_up.chunk(2, dim=-1)
    used = weights if weighted else None
    assert torch.allclose(kernels.gated_silu_forward(gate, up, used), wanted, atol=ALLOWED)
    grad_gate_up = torch.empty_like(gate_up)
    grad_weights = kernels.gated_silu_backward(grad, gate, up, used, *grad_gate_up.chunk(2, dim=-1))
    assert torch.allclose(grad_gate_up, reference[0].grad, atol=ALLOWED)
    if weighted:
        assert torch.allclose(grad_weights, reference[1].grad, atol=ALLOWED)
    else:
        assert grad_weights is None


@pytest.mark.parametrize(("tokens", "top_k", "width"), [(3, 3, 33), (1, 1, 8), (4, 2, 2100)])
def test_sum_rows(kernels: Any, tokens: int, top_k: int, width: int) -> None:
    rows = draw(tokens * top_k, width)
    index = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(0)).view(tokens, top_k)
    assert torch.allclose(kernels.sum_rows(rows, index), rows[index].sum(dim=1), atol=ALLOWED)
