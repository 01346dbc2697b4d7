"""The policy on a GPU: fused kernels against plain torch, variable-length attention against padding, bf16 against fp32,
and no synchronisation with the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rl.policy import attention, mla, moe
from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.policy.rope import rotate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.08,
}
LENGTHS = (40, 1, 129, 7, 64)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


def run(policy: Policy, device: str, routes: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """hidden, routes (sorted: the order of a token's experts is free) and every gradient, as fp32 on the CPU."""
    tokens, cu = (t.to(device) for t in batch())
    policy.zero_grad()
    out = policy(tokens, cu, max(LENGTHS), routes=None if routes is None else routes.to(device))
    cotangent = torch.randn(out.hidden.shape, generator=torch.Generator().manual_seed(2))
    out.hidden.backward(cotangent.to(device, out.hidden.dtype))
    found = {name: p.grad.float().cpu().clone() for name, p in policy.named_parameters() if p.grad is not None}
    assert out.routes is not None
    return found | {"hidden": out.hidden.detach().float().cpu(), "routes": out.routes.sort(dim=-1).values.cpu()}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("interleave", [True, False])
def test_fp32_equals_the_cpu(interleave: bool) -> None:
    policy = init_policy(PolicyConfig.from_dict(SHAPE | {"rope_interleave": interleave}), seed=0)
    wanted = run(policy, "cpu")
    got = run(policy.cuda(), "cuda")
    assert torch.equal(got.pop("routes"), wanted.pop("routes"))
    worst = max(error(got[name], wanted[name]) for name in wanted)
    print(f"\nfp32 GPU against CPU: {worst:.1e} (allowed 1e-4)")
    assert worst <= 1e-4


def test_bf16_is_close_to_fp32_when_routes_are_replayed() -> None:
    policy = init_policy(PolicyConfig.from_dict(SHAPE), seed=0)
    wanted = run(policy, "cpu")
    got = run(policy.to("cuda", torch.bfloat16), "cuda", routes=wanted["routes"])
    assert policy.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    errors = {name: error(got[name], wanted[name]) for name in wanted if name != "routes"}
    print(f"\nbf16 against fp32: hidden {errors['hidden']:.1e}, worst {max(errors.values()):.1e} (allowed 5e-2)")
    assert max(errors.values()) <= 5e-2


def test_fused_kernels_equal_plain_torch_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = init_policy(PolicyConfig.from_dict(SHAPE), seed=0, dtype=torch.bfloat16, device="cuda")
    fused = run(policy, "cuda")
    from rl.policy import activation

    for module in (activation, mla, moe):
        assert module.kernels is not None
        monkeypatch.setattr(module, "kernels", None)
    plain = run(policy, "cuda", routes=fused["routes"])
    worst = max(error(fused[name], plain[name]) for name in plain if name != "routes")
    print(f"\nfused against plain, bf16: {worst:.1e} (allowed 3e-2)")
    assert worst <= 3e-2


def test_varlen_attention_equals_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    attention._varlen_works.cache_clear()
    with torch.inference_mode():  # a rollout asks first: the probe must not mistake that for a missing kernel
        assert attention._varlen_works(torch.device("cuda", 0), torch.bfloat16, 192)
    assert attention._varlen_works(torch.device("cuda", 0), torch.bfloat16, 192)
    _, cu = batch()
    layout = attention.PackedLayout.of(cu.cuda(), num_tokens=sum(LENGTHS), max_seqlen=max(LENGTHS))
    results = []
    for varlen in (True, False):
        if not varlen:
            monkeypatch.setattr(attention, "_varlen_works", lambda *_: False)
        generator = torch.Generator().manual_seed(3)
        q, k, v = (
            torch.randn(sum(LENGTHS), 4, width, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
            for width in (192, 192, 128)
        )
        out = attention.attend(q, k, v, layout, scale=0.07)
        out.backward(torch.randn(out.shape, generator=generator).to("cuda", torch.bfloat16))
        results.append([t.float() for t in (out.detach(), q.grad, k.grad, v.grad)])
    assert all(error(got, wanted) <= 2e-2 for got, wanted in zip(*results, strict=True))


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the flash kernel is for Hopper"
)


@hopper
@pytest.mark.parametrize("lengths", [(1,), (127, 1, 128, 129, 255, 3, 256, 257), (2049, 17, 1500, 900)])
@pytest.mark.parametrize("widths", [(128, 64, 128), (64, 64, 64), (96, 32, 72), (32, 16, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_equals_assembled_heads(
    lengths: tuple[int, ...], widths: tuple[int, int, int], dtype: torch.dtype
) -> None:
    from rl.policy import flash, kernels

    (nope, rope, value), heads, tokens = widths, 3, sum(lengths)
    generator = torch.Generator().manual_seed(4)
    shapes = ((heads, nope + rope), (heads, nope + value), (rope,))
    q, kv, k_rope = (torch.randn(tokens, *shape, generator=generator).to("cuda", dtype) for shape in shapes)
    angles = torch.rand(tokens, rope // 2, generator=generator).cuda() * 6
    tables = angles.cos(), angles.sin()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32).cuda()
    layout = attention.PackedLayout.of(cu, num_tokens=tokens, max_seqlen=max(lengths))
    k_nope, v = kv.split((nope, value), dim=-1)
    assert flash.applies(q, k_nope, k_rope, v)
    got = flash.flash_mla(q, k_nope, k_rope, v, layout.query_tiles, scale=0.1, tables=tables, interleave=True).float()
    width = (max(nope + rope, value) + 7) // 8 * 8
    q, k, v = (x.float() for x in kernels.AssembleHeads.apply(q, kv, k_rope, *tables, nope, width, True))
    wanted = attention.attend(q, k, v[..., :value], layout, scale=0.1)
    assert (got - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    assert error(got, wanted) <= 5e-3


@hopper
def test_prefill_equals_the_forward_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from rl.policy import flash

    policy = init_policy(PolicyConfig.from_dict(SHAPE), seed=0, dtype=torch.bfloat16, device="cuda")
    tokens, cu = (t.cuda() for t in batch())
    wanted = policy(tokens, cu, max(LENGTHS))
    calls, plain = [], flash.flash_mla
    monkeypatch.setattr(flash, "flash_mla", lambda *args, **options: calls.append(1) or plain(*args, **options))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            same = policy(tokens, cu, max(LENGTHS), routes=wanted.routes)
            assert not calls
            got = policy(tokens, cu, max(LENGTHS), routes=wanted.routes, latents=[])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == SHAPE["num_hidden_layers"]
    assert same.hidden.equal(wanted.hidden)
    logits = [policy.lm_head(out.hidden).detach().float() for out in (got, wanted)]
    print(f"\nlogits of prefill against training: {error(*logits):.1e} (allowed 2e-2)")
    assert error(*logits) <= 2e-2


@pytest.mark.parametrize("kind", ["all_to_one", "two_used"])
def test_experts_without_tokens(kind: str) -> None:
    policy = init_policy(PolicyConfig.from_dict(SHAPE), seed=0, dtype=torch.bfloat16, device="cuda")
    experts = policy.model.layers[1].mlp.experts
    chosen = torch.full((50, 1), 15) if kind == "all_to_one" else torch.tensor([[3, 9]]).expand(50, 2)
    chosen = chosen.cuda()
    x = torch.randn(50, 128, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(chosen.shape, device="cuda")
    results = []
    for fast in (True, False):
        inputs = [t.detach().clone().requires_grad_() for t in (x, weights)]
        policy.zero_grad()
        if fast:
            out = experts(inputs[0], chosen, inputs[1])
        else:
            out = moe.experts_reference(inputs[0], chosen, inputs[1], experts.gate_up_proj, experts.down_proj)
        out.float().square().sum().backward()
        grads = (inputs[0].grad, inputs[1].grad, experts.gate_up_proj.grad, experts.down_proj.grad)
        results.append([t.float().clone() for t in (out.detach(), *grads)])
    for got, wanted in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        assert error(got, wanted) <= 2e-2
    unused = [e for e in range(16) if e not in chosen.unique().tolist()]
    assert (results[0][3][unused] == 0).all() and (results[0][4][unused] == 0).all()


def test_forward_and_backward_never_wait_for_the_device() -> None:
    policy = init_policy(PolicyConfig.from_dict(SHAPE), seed=0, dtype=torch.bfloat16, device="cuda")
    tokens, cu = (t.cuda() for t in batch())
    policy(tokens, cu, max(LENGTHS)).hidden.sum().backward()  # compiles and probes
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy(tokens, cu, max(LENGTHS)).hidden.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rotation_layouts_agree_on_the_gpu() -> None:
    x = torch.randn(5, 3, 8, device="cuda")
    cos, sin = torch.rand(5, 4, device="cuda"), torch.rand(5, 4, device="cuda")
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    assert torch.equal(rotate(x, (cos, sin), interleave=True), rotate(halves, (cos, sin), interleave=False))
    assert F.rms_norm(x, (8,)).is_cuda
