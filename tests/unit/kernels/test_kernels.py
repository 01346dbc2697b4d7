"""Every decode kernel against its few lines of torch, at awkward sizes: on the GPU if there is one, else
interpreted."""

import math

import pytest
import torch

pytest.importorskip("triton")

from rl.policy.config import PolicyConfig
from rl.policy.moe import Router
from rl.policy.rope import RotaryEmbedding, rotate
from rl.rollout import sampling as torch_sampling
from rl.rollout.arena import torch_zeros
from rl.rollout.kernels import attention, moe, norm, projections, reference, router, rows, sampling, sorting
from rl.rollout.kernels.decoder import prompt_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def poison(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    allowed = 3e-6 if dtype == torch.float32 else 1e-2
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.0e}"


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "parts", "more"), [(1, 32, 0, False), (3, 100, 1, False), (5, 64, 7, True)])
def test_combine_norm(dtype: torch.dtype, rows: int, width: int, parts: int, more: bool) -> None:
    x, weight = drawn(rows, width, dtype=dtype), drawn(width, dtype=dtype, seed=1)
    added = drawn(rows, parts, width, dtype=dtype, seed=2) if parts else None
    extra = drawn(rows, width, dtype=dtype, seed=3) if more else None
    residual, expected = reference.combine_norm(x, added, extra, weight, 1e-5)
    out = poison(rows, width, dtype=dtype)
    norm.combine_norm(x, added, extra, weight, 1e-5, out=out)
    assert_near(out, expected, dtype)
    assert_near(x, residual, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_norm(dtype: torch.dtype) -> None:
    table, weight, tokens = drawn(7, 40, dtype=dtype), drawn(40, dtype=dtype, seed=1), torch.tensor([6, 0, 6])
    x, out = poison(3, 40, dtype=dtype), poison(3, 40, dtype=dtype)
    norm.embed_norm(tokens.to(DEVICE), table, weight, 1e-5, x=x, out=out)
    assert torch.equal(x.cpu(), table.cpu()[tokens])
    assert_near(out, reference.combine_norm(x, None, None, weight, 1e-5)[1], dtype)


ROUTINGS = {
    "random": lambda n, e, k: torch.rand(n, e, generator=torch.Generator().manual_seed(n)).topk(k).indices,
    "all_to_one": lambda n, e, k: torch.arange(k).expand(n, k),
    "last_experts_empty": lambda n, e, k: torch.stack([(torch.arange(k) + i) % (e // 2) for i in range(n)]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "shared", "width", "inner"),
    [(1, 4, 2, 1, 32, 32), (7, 8, 3, 0, 64, 48), (37, 8, 2, 2, 96, 80)],
)
def test_grouped_experts(
    dtype: torch.dtype, routing: str, rows: int, experts: int, top_k: int, shared: int, width: int, inner: int
) -> None:
    routes = ROUTINGS[routing](rows, experts, top_k)
    x = drawn(rows, width, dtype=dtype)
    weights = drawn(rows, top_k, seed=1).abs()
    gate_up = drawn(experts, 2 * inner, width, dtype=dtype, seed=2, scale=width**-0.5)
    down = drawn(experts, width, inner, dtype=dtype, seed=3, scale=inner**-0.5)
    extra = None
    if shared:
        shapes = [(shared * inner, width), (shared * inner, width), (width, shared * inner)]
        extra = tuple(drawn(*s, dtype=dtype, seed=4 + i, scale=s[1] ** -0.5) for i, s in enumerate(shapes))
    expected = reference.grouped_experts(x, routes, weights, gate_up, down, extra)
    slots, layer = top_k + shared, moe.ExpertWeights(gate_up, down, *(extra or ()))
    counts, lists = torch.zeros(experts, dtype=torch.int32), torch.zeros(experts, rows, dtype=torch.int32)
    for n in range(rows):
        for k, expert in enumerate(routes[n].tolist()):
            lists[expert, counts[expert]] = n * slots + k
            counts[expert] += 1
    for tile in [None, (moe.Tile(32, 64, 32, 4, 2), moe.Tile(16, 32, 64, 4, 2))]:
        act, out = poison(rows * slots, inner, dtype=dtype), poison(rows, slots, width, dtype=dtype)
        moe.grouped_experts(
            x, layer, weights, counts.to(DEVICE), lists.to(DEVICE), act=act, out=out, tiles=tile
        )
        assert_near(out.float().sum(1), expected, dtype)


SORTED = {  # rows, of which the first are idle; experts, choices
    "last_experts_empty": (40, 3, 8, 2),
    "one_row": (1, 0, 4, 2),
    "all_to_one": (300, 0, 8, 1),
    "129_in_one": (129, 0, 4, 1),
    "random": (300, 7, 8, 4),
}


def listed(rows: int, idle: int, experts: int, top_k: int, shared: int, routing: str):
    """-> routes (N, K), counts, lists."""
    routes = ROUTINGS[routing if routing in ROUTINGS else "all_to_one"](rows, experts, top_k)
    counts, lists = torch.zeros(experts, dtype=torch.int32), torch.full((experts, rows + 3), -9, dtype=torch.int32)
    for n in range(idle, rows):
        for k, expert in enumerate(routes[n].tolist()):
            lists[expert, counts[expert]] = n * (top_k + shared) + k
            counts[expert] += 1
    return routes, counts, lists


@pytest.mark.parametrize("routing", list(SORTED))
@pytest.mark.parametrize("shared", [0, 2])
def test_sort_rows(routing: str, shared: int) -> None:
    """Every place holds its assignment's row and weight; tiles cover every routed place once, an expert each."""
    rows, idle, experts, top_k = SORTED[routing]
    _, counts, lists = listed(rows, idle, experts, top_k, shared, routing)
    x, weights, down = drawn(rows, 64), drawn(rows, top_k, seed=1).abs(), drawn(experts, 64, 64)
    extra = [drawn(shared * 64, 64), drawn(shared * 64, 64), drawn(64, shared * 64)] if shared else []
    scratch = sorting.SortedRows.of(
        torch_zeros(DEVICE), rows, top_k=top_k, parts=shared, experts=experts, width=64, dtype=torch.float32
    )
    layer = moe.ExpertWeights(drawn(experts, 128, 64), down, *extra)
    sorting.sort_rows(x, layer, weights, counts.to(DEVICE), lists.to(DEVICE), scratch, rows=32)
    order, slots = scratch.order.tolist(), top_k + shared
    expected = [lists[e, i].item() for e in range(experts) for i in range(counts[e])]
    places = len(expected)
    assert order[:places] == expected
    parts = [n * slots + top_k + part for part in range(shared) for n in range(rows)]
    assert order[rows * top_k :] == parts and scratch.scales[rows * top_k :].eq(1).all()
    assert torch.equal(scratch.rows[:places], x[scratch.order[:places].long() // slots])
    chosen = [weights[a // slots, a % slots] for a in expected]
    assert torch.equal(scratch.scales[:places], torch.stack(chosen))
    table = scratch.table.view(-1, 4).tolist()
    tiles = table[1 : 1 + table[0][0]]
    covered = sorted(place for _, first, count, _ in tiles for place in range(first, first + count))
    assert covered == [*range(places)]
    begins = [sum(counts[:e].tolist()) for e in range(experts)]
    for expert, first, count, _ in tiles:
        begin, size = begins[expert], counts[expert].item()
        assert (first - begin) % 32 == 0 and count == min(32, begin + size - first)


@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] != 9, reason="instructions of Hopper GPUs"
)
@pytest.mark.parametrize("routing", list(SORTED))
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(
    ("width", "inner", "tile_rows", "block"),
    [(256, 640, 128, 128), (2048, 1408, 128, 32), (192, 64, 64, 64)],
)
def test_hopper_experts(
    monkeypatch: pytest.MonkeyPatch, routing: str, shared: int, width: int, inner: int, tile_rows: int, block: int
) -> None:
    """Against the reference and, to the bit, itself; parts of idle rows are left alone. `moe` gets there too."""
    from rl.rollout.kernels import hopper_experts

    rows, idle, experts, top_k = SORTED[routing]
    routes, counts, lists = listed(rows, idle, experts, top_k, shared, routing)
    dtype, slots = torch.bfloat16, top_k + shared
    x, weights = drawn(rows, width, dtype=dtype), drawn(rows, top_k, seed=1).abs().add_(0.1)
    gate_up = drawn(experts, 2 * inner, width, dtype=dtype, seed=2, scale=width**-0.5)
    down = drawn(experts, width, inner, dtype=dtype, seed=3, scale=inner**-0.5)
    extra = None
    if shared:
        shapes = [(shared * inner, width), (shared * inner, width), (width, shared * inner)]
        extra = tuple(drawn(*s, dtype=dtype, seed=4 + i, scale=s[1] ** -0.5) for i, s in enumerate(shapes))
    layer = moe.ExpertWeights(gate_up, down, *(extra or ()))
    scratch = sorting.SortedRows.of(
        torch_zeros(DEVICE), rows, top_k=top_k, parts=shared, experts=experts, width=width, dtype=dtype
    )
    assert hopper_experts.fits(x, layer)
    results = []
    for _ in range(3):
        act, out = poison(rows * slots, inner, dtype=dtype), poison(rows, slots, width, dtype=dtype)
        hopper_experts.grouped_experts(
            x, layer, weights, counts.to(DEVICE), lists.to(DEVICE), scratch, act=act, out=out, rows=tile_rows,
            block=block,
        )  # fmt: skip
        results.append(out)
    assert results[0][:idle, :top_k].isnan().all() and not results[0][idle:].isnan().any()
    assert all(torch.equal(out[idle:], results[0][idle:]) for out in results[1:])
    expected = reference.grouped_experts(x, routes, weights, gate_up, down, extra)
    assert_near(results[0].float().sum(1)[idle:], expected[idle:], dtype)
    monkeypatch.setattr(moe, "SORT_FROM", 0)
    monkeypatch.setattr(moe, "SORT_MATRIX", 0)
    monkeypatch.setattr(hopper_experts, "default_rows", lambda rows_per_expert: tile_rows)
    act, out = poison(rows * slots, inner, dtype=dtype), poison(rows, slots, width, dtype=dtype)
    moe.grouped_experts(
        x, layer, weights, counts.to(DEVICE), lists.to(DEVICE), act=act, out=out, sorted_rows=scratch
    )
    assert torch.equal(out[idle:], results[0][idle:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_rows(dtype: torch.dtype) -> None:
    x, gate, up = drawn(5, 48, dtype=dtype), drawn(72, 48, dtype=dtype, seed=1), drawn(72, 48, dtype=dtype, seed=2)
    act = poison(5, 72, dtype=dtype)
    moe.gated_rows(x, gate, up, act=act)
    expected = torch.nn.functional.silu(x.float() @ gate.float().t()) * (x.float() @ up.float().t())
    assert_near(act, expected, dtype)


CONTEXTS = [
    # heads, latent, rope, groups of rows, prompt lengths, own lengths
    (4, 32, 16, [[0]], [1], [1]),
    (4, 32, 16, [[0, 2, 4], [1], [3]], [40, 3, 17], [1, 33, 16, 70, 5]),
    (16, 64, 16, [[0, 1, 2, 3, 4, 5]], [37], [1, 2, 3, 31, 32, 33]),
    (3, 40, 24, [[1], [0, 2]], [5, 64], [7, 1, 48]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [(1, 1), (3, 2)])
@pytest.mark.parametrize(("heads", "latent", "rope", "groups", "prompt_lengths", "own_lengths"), CONTEXTS)
def test_two_part_attention_is_one_softmax(
    dtype: torch.dtype,
    splits: tuple[int, int],
    heads: int,
    latent: int,
    rope: int,
    groups: list[list[int]],
    prompt_lengths: list[int],
    own_lengths: list[int],
) -> None:
    rows, width, nope, value = len(own_lengths), latent + rope, 16, 24
    group_of = {row: g for g, members in enumerate(groups) for row in members}
    q = drawn(rows, heads, width, dtype=dtype)
    prompt = drawn(len(groups) + 1, max(prompt_lengths) + 3, width, dtype=dtype, seed=1)
    own = drawn(rows + 2, max(own_lengths) + 5, width, dtype=dtype, seed=2)
    slots = [(row * 2 + 1) % (rows + 2) if rows % 2 else row + 2 for row in range(rows)]
    caches = [
        torch.cat((prompt[group_of[n] + 1, : prompt_lengths[group_of[n]]], own[slots[n], : own_lengths[n]]))
        for n in range(rows)
    ]
    expected = reference.attend(q, caches, latent, scale=width**-0.5)
    partial = poison(rows, sum(splits), heads, latent, dtype=dtype)
    lse = poison(rows, sum(splits), heads, dtype=torch.float32)
    for per_tile in (1, 4):
        tiles = torch.tensor(prompt_tiles(groups, per_tile, rows + 1), dtype=torch.int32, device=DEVICE)
        lengths = ints([prompt_lengths[group_of[n]] for n in range(rows)])
        common = {"scale": width**-0.5, "out": partial, "lse": lse}
        attention.attend(
            q, prompt, ints([group_of[n] + 1 for n in range(rows)]), lengths, tiles=tiles, first_split=0,
            splits=splits[0], **common,
        )  # fmt: skip
        attention.attend(q, own, ints(slots), ints(own_lengths), first_split=splits[0], splits=splits[1], **common)
        assert_near(reference.merge(partial, lse), expected, dtype)
        kv_b = drawn(heads * (nope + value), latent, dtype=dtype, seed=3, scale=latent**-0.5)
        out = poison(rows, heads * value, dtype=dtype)
        projections.merge_and_expand(partial, lse, kv_b, nope=nope, out=out)
        w_uv = kv_b.view(heads, nope + value, latent)[:, nope:].float()
        assert_near(out.view(rows, heads, value), torch.einsum("nhc,hvc->nhv", expected, w_uv), dtype)


@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] != 9, reason="instructions of Hopper GPUs"
)
@pytest.mark.parametrize("latent", [256, 512])
@pytest.mark.parametrize("splits", [1, 3])
def test_hopper_attention(latent: int, splits: int) -> None:
    """One block and many, full and not, odd and even, rows missing."""
    lengths, sizes, width = [1, 64, 65, 129, 300, 1027], [3, 4, 1, 6, 2, 4], latent + 64
    owners = [g for g, size in enumerate(sizes) for _ in range(size)]
    groups = [[n for n, g in enumerate(owners) if g == group] for group in range(len(sizes))]
    q, prompt = drawn(len(owners), 16, width, dtype=torch.bfloat16), drawn(7, 1040, width, dtype=torch.bfloat16, seed=1)
    expected = reference.attend(q, [prompt[g + 1, : lengths[g]] for g in owners], latent, scale=width**-0.5)
    tiles = torch.tensor(prompt_tiles(groups, 4, len(owners)), dtype=torch.int32, device=DEVICE)
    partial = poison(len(owners), splits + 1, 16, latent, dtype=torch.bfloat16)
    lse = torch.full((len(owners), splits + 1, 16), -math.inf, device=DEVICE)
    attention.attend(
        q, prompt, ints([g + 1 for g in owners]), ints([lengths[g] for g in owners]), scale=width**-0.5, out=partial,
        lse=lse, first_split=1, splits=splits, tiles=tiles,
    )  # fmt: skip
    assert_near(reference.merge(partial, lse), expected, torch.bfloat16)


def test_fixed_splits_do_not_depend_on_their_number() -> None:
    q, own = drawn(2, 4, 48), drawn(2, 80, 48, seed=1)
    results = []
    for splits in (3, 5):
        partial, lse = poison(2, splits, 4, 32, dtype=torch.float32), poison(2, splits, 4, dtype=torch.float32)
        attention.attend(
            q, own, ints([0, 1]), ints([70, 9]), scale=0.2, out=partial, lse=lse, first_split=0, splits=splits,
            split_tokens=32,
        )  # fmt: skip
        results.append(torch.where(lse[:, :3, :, None] > -math.inf, partial[:, :3], 0.0))
    assert torch.equal(results[0], results[1])


def test_idle_rows_give_zeros_not_nan() -> None:
    partial, lse = poison(2, 2, 4, 32, dtype=torch.float32), torch.full((2, 2, 4), -math.inf, device=DEVICE)
    out = poison(2, 4 * 16, dtype=torch.float32)
    projections.merge_and_expand(partial, lse, drawn(4 * 32, 32), nope=16, out=out)
    assert out.eq(0).all()


def rope_config(interleave: bool, rope: int) -> PolicyConfig:
    return PolicyConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=3, kv_lora_rank=40,
        qk_rope_head_dim=rope,
        qk_nope_head_dim=20, v_head_dim=24, intermediate_size=32, rope_interleave=interleave,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("rows", [1, 19])
def test_absorb_writes_queries_and_cache(dtype: torch.dtype, interleave: bool, rows: int) -> None:
    heads, nope, value, latent, rope = 3, 20, 24, 40, 16
    rotary = RotaryEmbedding(rope_config(interleave, rope))
    projected = drawn(rows, heads * (nope + rope) + latent + rope, dtype=dtype)
    q, kv = projected[:, : heads * (nope + rope)], projected[:, heads * (nope + rope) :]
    kv_b = drawn(heads * (nope + value), latent, dtype=dtype, seed=1, scale=nope**-0.5)
    gain = drawn(latent, dtype=dtype, seed=2)
    positions = ints([(7 * n + 3) % 50 for n in range(rows)])
    cos, sin = (t.to(DEVICE) for t in rotary.tables(torch.arange(50)))
    slots, places = ints([rows - 1 - n for n in range(rows)]), ints([n % 4 if n != 2 else -1 for n in range(rows)])
    cache = torch.zeros(rows, 4, latent + rope, dtype=dtype, device=DEVICE)
    out = poison(rows, heads, latent + rope, dtype=dtype)
    projections.absorb(
        q, kv, kv_b, gain, (cos, sin), positions, slots, places, cache,
        nope=nope, interleave=interleave, eps=1e-6, out=out,
    )  # fmt: skip
    by_head = q.view(rows, heads, nope + rope)
    angles = (cos[positions.long()], sin[positions.long()])
    w_uk = kv_b.view(heads, nope + value, latent)[:, :nope].float()
    assert_near(out[..., :latent], torch.einsum("nhd,hdc->nhc", by_head[..., :nope].float(), w_uk), dtype)
    assert_near(out[..., latent:], rotate(by_head[..., nope:], angles, interleave=interleave), dtype)
    expected = torch.zeros_like(cache)
    line = torch.nn.functional.rms_norm(kv[:, :latent].float(), (latent,), gain.float(), 1e-6).to(dtype)
    turned = rotate(kv[:, latent:], angles, interleave=interleave)
    for n in range(rows):
        if places[n] >= 0:
            expected[slots[n], places[n]] = torch.cat((line[n], turned[n]))
    assert_near(cache, expected, dtype)


ROUTERS = [
    # experts, K, groups, kept groups, sigmoid, normalise
    (8, 2, 1, 1, True, True),
    (12, 3, 4, 2, True, True),
    (64, 6, 1, 1, True, False),
    (20, 4, 4, 2, False, False),
    (20, 3, 5, 2, True, True),
    (384, 8, 1, 1, True, True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top_k", "groups", "kept", "sigmoid", "normalise"), ROUTERS)
def test_router(
    dtype: torch.dtype, experts: int, top_k: int, groups: int, kept: int, sigmoid: bool, normalise: bool
) -> None:
    config = PolicyConfig(
        vocab_size=8, hidden_size=72, num_hidden_layers=1, num_attention_heads=1, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=4, intermediate_size=8, n_routed_experts=experts, num_experts_per_tok=top_k,
        moe_intermediate_size=8, n_group=groups, topk_group=kept, norm_topk_prob=normalise, routed_scaling_factor=2.5,
        model_type="deepseek_v3" if sigmoid else "deepseek_v2",
        topk_method=None if sigmoid else "group_limited_greedy",
    )  # fmt: skip
    module = Router(config)
    module.weight.data = drawn(experts, 72, seed=1, scale=0.2).cpu()
    module = module.to(DEVICE).to(dtype)
    if module.e_score_correction_bias is not None:
        module.e_score_correction_bias.copy_(drawn(experts, seed=2, scale=0.1))
    rows, shared = 21, 2
    h = drawn(rows, 72, dtype=dtype)
    h[7] = math.nan  # must choose as many experts as any row, and spoil no other
    with torch.no_grad():
        chosen, expected = module(h)
    weights = poison(rows, top_k, dtype=torch.float32)
    counts = torch.zeros(experts, dtype=torch.int32, device=DEVICE)
    lists = torch.full((experts, rows), -1, dtype=torch.int32, device=DEVICE)
    record = torch.full((rows, 3, 2, top_k), 999, dtype=torch.int16, device=DEVICE)
    places = ints([n % 3 if n != 5 else -1 for n in range(rows)])
    slots = ints([rows - 1 - n for n in range(rows)])
    scratch = router.router_scratch(rows + 5, experts, torch_zeros(DEVICE))
    for _ in range(2):  # twice: the scratch must be ready again
        counts.zero_()
        router.route(
            h, module, num_shared=shared, slots=slots, places=places, weights=weights, counts=counts, lists=lists,
            record=record[:, :, 1], scratch=scratch,
        )  # fmt: skip
    found = torch.stack([record[slots[n], places[n], 1].long() for n in range(rows)])
    busy = [n for n in range(rows) if n != 5]
    assert len(set(found[7].tolist())) == top_k and int(found[7].max()) < experts and weights[7].isnan().all()
    sound = [n for n in busy if n != 7]
    assert torch.equal(found[sound].sort().values, chosen[sound].sort().values)
    order, other = found.argsort(), chosen.argsort()
    assert_near(weights.gather(1, order)[sound], expected.gather(1, other)[sound], torch.float32)
    assert record[:, :, 0].eq(999).all() and record[slots[5]].eq(999).all()
    for expert in range(experts):
        members = {n * (top_k + shared) + int(k) for n in busy for k in (found[n] == expert).nonzero()}
        assert set(lists[expert, : counts[expert]].tolist()) == members
    assert int(counts.sum()) == len(busy) * top_k


@pytest.mark.parametrize("vocab", [5, 1000, 9001])
def test_draw_equals_torch(vocab: int) -> None:
    rows = 6
    logits = drawn(rows, vocab, scale=3.0)
    logits[2, : vocab - 2] = -math.inf  # whole chunks without a candidate
    logits[3] = logits[3, 0].clone()  # the noise alone decides; without noise the first of equals
    seeds = torch.tensor([0, -1, 5, 2**62, -(2**63), 12345], device=DEVICE)
    steps = torch.tensor([0, 1, 2, 3, 10**6, 7], device=DEVICE)
    for temperature in (0.0, 1.0, 0.7):
        expected, logprob = torch_sampling.Sampler(temperature=temperature)(logits, seeds, steps)
        how = torch.tensor([1 / temperature, 1.0] if temperature else [1.0, 0.0], device=DEVICE)
        tokens, found = sampling.draw(logits, seeds, steps, how)
        assert torch.equal(tokens, expected)
        assert (found - logprob).abs().max() < 2e-5


def test_draw_follows_the_distribution() -> None:
    """Chi-square of 4,000 draws over 5 ids; 99.99 % quantile of 4 degrees of freedom is 23.5."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.09, 0.01])
    rows = 4000 if DEVICE.type == "cuda" else 200
    logits = probabilities.log().repeat(rows, 1).to(DEVICE)
    tokens, _ = sampling.draw(
        logits, torch.arange(rows, device=DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        torch.tensor([1.0, 1.0], device=DEVICE),
    )  # fmt: skip
    seen = torch.bincount(tokens.cpu(), minlength=5).double()
    chi = ((seen - rows * probabilities) ** 2 / (rows * probabilities)).sum()
    assert chi < 23.5


def test_prompt_tiles_by_hand() -> None:
    assert prompt_tiles([[0, 1, 2], [3]], 2, 4) == [[0, 1], [2, -1], [3, -1], [-1, -1]]
    with pytest.raises(ValueError, match="3 tiles"):
        prompt_tiles([[0], [1], [2]], 2, 2)


def test_begin_and_finish_keep_the_row_state() -> None:
    """Row 0 goes on, row 1 draws a stop token, row 2 reaches the limit of 4, row 3 had ended before."""
    vocab, limit, count = 40, 4, 4

    def longs(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=DEVICE)

    state = rows.Rows(
        token=longs([1, 1, 1, 1]), own_len=longs([0, 1, 2, 1]), prompt_slot=longs([0, 0, 1, 1]),
        prompt_len=longs([5, 5, 9, 9]), seed=longs([1, 2, 3, 4]), done=longs([0, 0, 0, 1]).bool(),
        out_tokens=torch.zeros(count, limit + 1, dtype=torch.int64, device=DEVICE),
        out_logprobs=torch.zeros(count, limit + 1, device=DEVICE), stops=longs([7, 30]), row_limit=longs([4, 4, 4, 4]),
    )  # fmt: skip
    counts = torch.ones(3, 700, dtype=torch.int32, device=DEVICE)
    scratch = torch.full((5, 6), -9, dtype=torch.int32, device=DEVICE)
    found = rows.begin(state, scratch, counts, count)
    expected = [[5, 6, 11, 0], [0, 1, 2, -1], [1, 2, 3, 0], [0, 0, 1, 1], [5, 5, 9, 9]]
    assert [line.tolist() for line in found] == expected
    assert not counts.any() and scratch[:, 4:].eq(-9).all()
    logits = torch.zeros(count, vocab, device=DEVICE)
    for row, token in enumerate([3, 30, 4, 9]):
        logits[row, token] = 10.0
    greedy = torch.tensor([1.0, 0.0], device=DEVICE)
    rows.finish(state, *sampling.race(logits, state.seed, state.own_len, greedy, step_offset=1))
    assert state.token.tolist() == [3, 30, 4, 1]
    assert state.own_len.tolist() == [1, 2, 3, 1]
    assert state.done.tolist() == [False, True, True, True]
    assert state.out_tokens.tolist() == [[0, 3, 0, 0, 0], [0, 0, 30, 0, 0], [0, 0, 0, 4, 0], [0, 0, 9, 0, 0]]
    logprob = 10.0 - math.log(math.exp(10.0) + vocab - 1)
    assert abs(float(state.out_logprobs[2, 3]) - logprob) < 1e-5


def test_race_uses_the_given_step() -> None:
    logits, seeds = drawn(5, 300), torch.arange(5, device=DEVICE)
    how = torch.tensor([1.0, 1.0], device=DEVICE)
    _, shifted = sampling.race(logits, seeds, torch.full((5,), 6, device=DEVICE), how, step_offset=3)
    tokens, _ = sampling.draw(logits, seeds, torch.full((5,), 9, device=DEVICE), how)
    assert shifted.view(-1).tolist() == tokens.tolist()
