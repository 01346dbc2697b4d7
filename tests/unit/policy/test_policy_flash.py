"""The policy's flash kernel, interpreted on the CPU in fp32, against a plain softmax: ragged lengths, views, widths."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rl.policy.rope import rotate

pytest.importorskip("triton.language")
ALLOWED = 1e-5


@pytest.fixture(scope="module")
def flash() -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    from rl.policy import flash as module

    if not isinstance(module._flash_kernel, InterpretedFunction):
        pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; tests/gpu covers the kernels on a GPU")
    return module


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def reference(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, nope: int, lengths: tuple[int, ...], scale: float
) -> torch.Tensor:
    """q: (T, H, nope + R) turned, kv: (T, H, nope + V) -> (T, H, V), one sequence at a time in float64."""
    q, kv, k_rope = q.double(), kv.double(), k_rope.double()
    outputs = []
    for begin, end in itertools.pairwise(offsets(lengths).tolist()):
        rows, length = slice(begin, end), end - begin
        k = torch.cat((kv[rows, :, :nope], k_rope[rows].unsqueeze(1).expand(-1, kv.shape[1], -1)), dim=-1)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k) * scale
        beyond = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(beyond, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khv->qhv", weights, kv[rows, :, nope:]))
    return torch.cat(outputs)


LENGTHS = [(1,), (63, 1, 64, 65), (0, 128, 0, 129, 2), (193, 5)]
WIDTHS = [(2, 16, 16, 16), (3, 24, 16, 40), (1, 32, 32, 8)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(flash: Any, lengths: tuple[int, ...]) -> None:
    check(flash, lengths, WIDTHS[1])


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("turned", ["already", "interleaved", "halves"])
def test_widths_and_rotation(flash: Any, widths: tuple[int, ...], turned: str) -> None:
    check(flash, (80, 1, 17), widths, turned)


def check(flash: Any, lengths: tuple[int, ...], widths: tuple[int, ...], turned: str = "interleaved") -> None:
    heads, nope, rope, value = widths
    tokens, interleave = sum(lengths), turned == "interleaved"
    q, kv, k_rope = 3 * draw(tokens, heads, nope + rope), draw(tokens, heads, nope + value), draw(tokens, rope)
    tables = None if turned == "already" else (draw(tokens, rope // 2), draw(tokens, rope // 2) + 1)
    wanted_q = q
    if tables is not None:
        wanted_q = torch.cat((q[..., :nope], rotate(q[..., nope:], tables, interleave=interleave)), dim=-1)
    tiles = flash.query_tiles(offsets(lengths), num_tokens=tokens, max_seqlen=max(lengths), section=50)
    got = flash.flash_mla(
        q, kv[..., :nope], k_rope, kv[..., nope:], tiles, scale=0.3, tables=tables, interleave=interleave
    )
    wanted = reference(wanted_q, kv, k_rope, nope, lengths, 0.3)
    assert got.is_contiguous() and got.shape == wanted.shape
    assert (got - wanted).abs().max() <= ALLOWED


def test_query_tiles_worked_example(flash: Any) -> None:
    tiles = flash.query_tiles(offsets((300, 10)), num_tokens=310, max_seqlen=300, queries=128)
    assert tiles.tolist() == [[256, 0, 300], [128, 0, 300], [0, 0, 300], [300, 300, 310]]


@pytest.mark.parametrize("lengths", [*LENGTHS, (5, 200, 7, 0, 33, 64)])
def test_query_tiles_hold_each_block_once(flash: Any, lengths: tuple[int, ...]) -> None:
    for section in (20, 100000):
        tiles = flash.query_tiles(
            offsets(lengths), num_tokens=sum(lengths), max_seqlen=max(lengths), queries=16, section=section
        )
        got = sorted(row for row in tiles.tolist() if row[0] < row[2])
        ends = offsets(lengths).tolist()
        spans = itertools.pairwise(ends)
        assert got == [[first, begin, end] for begin, end in spans for first in range(begin, end, 16)]


def test_no_tokens(flash: Any) -> None:
    tiles = flash.query_tiles(offsets(()), num_tokens=0, max_seqlen=0)
    q, kv, k_rope = draw(0, 2, 32), draw(0, 2, 32), draw(0, 16)
    assert flash.flash_mla(q, kv[..., :16], k_rope, kv[..., 16:], tiles, scale=1.0).shape == (0, 2, 16)
