"""What each kernel computes, in a few lines of torch: the oracle of the kernel tests, in fp32 or fp64, on any device.

Signatures follow the kernels; results are returned instead of written. Slow and obvious on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def combine_norm(
    x: torch.Tensor, parts: torch.Tensor | None, extra: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the new residual (N, D), rounded to its dtype, and its RMSNorm."""
    if parts is not None:
        x = (x.float() + parts.float().sum(1) + (0.0 if extra is None else extra.float())).to(x.dtype)
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return x, (scaled * weight.float()).to(x.dtype)


def attend(
    q: torch.Tensor, caches: list[torch.Tensor], latent_rank: int, *, scale: float
) -> torch.Tensor:
    """q: (N, H, C + R); caches[n]: (T_n, C + R), all tokens row n attends to -> (N, H, C) float32."""
    out = []
    for query, cache in zip(q.float(), caches, strict=True):
        weights = (query @ cache.float().t() * scale).softmax(-1)
        out.append(weights @ cache.float()[:, :latent_rank])
    return torch.stack(out)


def merge(partial: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """partial: (N, S, H, C), lse: (N, S, H) -> (N, H, C) float32, splits weighed by exp(lse); lse -inf is left out."""
    share = lse.softmax(1).unsqueeze(-1).nan_to_num(0.0)
    return torch.where(share > 0, partial.float() * share, 0.0).sum(1)


def grouped_experts(
    x: torch.Tensor,
    routes: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """routes: (N, K), weights: (N, K) float32; shared: gate, up (S*I, D) and down (D, S*I) -> the layer's output (N, D)
    float32."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for n in range(x.shape[0]):
        for expert, weight in zip(routes[n].tolist(), weights[n].tolist(), strict=True):
            gate, up = (gate_up[expert].float() @ x[n].float()).chunk(2)
            out[n] += weight * (down[expert].float() @ (F.silu(gate) * up))
    if shared is not None:
        gate, up, last = (w.float() for w in shared)
        out += (F.silu(x.float() @ gate.t()) * (x.float() @ up.t())) @ last.t()
    return out
