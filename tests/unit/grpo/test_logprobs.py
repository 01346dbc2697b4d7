"""Chunked logprobs against a plain log-softmax over all logits, values and gradients; the shift on worked examples."""

from collections.abc import Callable
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from rl.grpo.logprobs import completion_positions, shift, suggest_chunk_tokens, token_logprobs

T, D, V = 23, 8, 31


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).mul(2).to(dtype).requires_grad_()
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=generator, dtype=torch.float64))
    targets = torch.randint(V, (T,), generator=generator)
    return hidden, head, targets, torch.randn(T, generator=generator)


def plain(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    table = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    return table.gather(-1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("chunk_tokens", "num_chunks"), [(1000, None), (7, None), (1, None), (7, 5), (7, 40)])
def test_equals_the_plain_log_softmax(temperature: float, chunk_tokens: int, num_chunks: int | None) -> None:
    hidden, head, targets, upstream = make_inputs()
    expected, expected_entropy = plain(hidden, head, targets, temperature)
    wanted = torch.autograd.grad((expected * upstream).sum(), [hidden, head.weight])
    logprobs, entropy = token_logprobs(
        hidden, head, targets, temperature=temperature, chunk_tokens=chunk_tokens, num_chunks=num_chunks
    )
    found = torch.autograd.grad((logprobs * upstream).sum(), [hidden, head.weight])
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)  # measured 1e-6
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)
    assert logprobs.dtype == torch.float32 and not entropy.requires_grad


def test_gradcheck_in_float64() -> None:
    hidden, head, targets, _ = make_inputs(torch.float64)
    head.requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda rows: token_logprobs(rows, head, targets, temperature=0.7, chunk_tokens=9)[0], (hidden,), atol=1e-6
    )


def test_bfloat16_scores_in_float32_and_keeps_gradient_dtype() -> None:
    hidden, head, targets, upstream = make_inputs(torch.bfloat16)
    expected, expected_entropy = plain(hidden, head, targets, 1.0)
    logprobs, entropy = token_logprobs(hidden, head, targets, chunk_tokens=8)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad((expected * upstream).sum(), [hidden, head.weight])
    found = torch.autograd.grad((logprobs * upstream).sum(), [hidden, head.weight])
    for gradient, reference in zip(found, wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, reference, rtol=2e-2, atol=5e-2)


def test_one_token_certain_and_huge_logits_stay_finite() -> None:
    rows = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(rows, nn.Identity(), torch.tensor([0]))
    assert logprobs.item() == 0.0 and entropy.item() == 0.0
    logprobs, entropy = token_logprobs(torch.zeros(1, 4), nn.Identity(), torch.tensor([2]))
    assert logprobs.item() == pytest.approx(-1.3862944) and entropy.item() == pytest.approx(1.3862944)


class CountingHead(nn.Module):
    """Counts rows per call: forward and recomputation."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.calls = head, list[int]()

    def forward(self, rows: Tensor) -> Tensor:
        self.calls.append(rows.shape[0])
        logits: Tensor = self.head(rows)
        return logits


def test_recomputes_chunks_only_in_backward_and_only_when_there_are_several() -> None:
    hidden, linear, targets, _ = make_inputs()
    for chunk_tokens, forward, backward in [(8, [8, 8, 7], 3), (23, [23], 0)]:
        head = CountingHead(linear)
        logprobs, _ = token_logprobs(hidden, head, targets, chunk_tokens=chunk_tokens)
        assert head.calls == forward
        logprobs.sum().backward()
        assert len(head.calls) == len(forward) + backward
    with torch.no_grad():
        head = CountingHead(linear)
        token_logprobs(hidden, head, targets, chunk_tokens=8)
        assert head.calls == [8, 8, 7]


def test_num_chunks_makes_ranks_call_the_head_equally_often_even_without_tokens() -> None:
    _, linear, _, _ = make_inputs()
    head = CountingHead(linear)
    hidden = torch.zeros(0, D, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, head, torch.zeros(0, dtype=torch.long), num_chunks=3)
    logprobs.sum().backward()
    assert head.calls == [0] * 6 and logprobs.shape == entropy.shape == (0,)
    assert linear.weight.grad is not None and linear.weight.grad.eq(0).all()


def test_keeps_less_memory_than_the_logits() -> None:
    """What autograd saves between forward and backward must not grow with the vocabulary."""
    hidden, head, targets, _ = make_inputs()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprobs(hidden, head, targets, chunk_tokens=4)
    assert sum(saved) < T * V


def test_user_errors_are_named() -> None:
    hidden, head, targets, _ = make_inputs()
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(hidden, head, targets, temperature=0)
    with pytest.raises(ValueError, match="expected \\(T, D\\) and \\(T,\\)"):
        token_logprobs(hidden, head, targets[:-1])
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        token_logprobs(hidden, head, targets, chunk_tokens=0)


def test_shift_by_hand() -> None:
    shifted = shift(torch.tensor([5, 6, 7, 8, 2, 9, 3, 4]), torch.tensor([0, 5, 6, 8], dtype=torch.int32))
    assert shifted.inputs.tolist() == [5, 6, 7, 8, 3]
    assert shifted.targets.tolist() == [6, 7, 8, 2, 4]
    assert shifted.cu_seqlens.tolist() == [0, 4, 4, 5] and shifted.cu_seqlens.dtype == torch.int32
    assert shifted.max_seqlen == 4


def test_shift_refuses_borders_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not cover"):
        shift(torch.tensor([1, 2, 3]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="at least 1"):
        shift(torch.tensor([1, 2, 3]), torch.tensor([0, 3, 3]))


def test_completion_positions_select_the_completion_targets() -> None:
    """The worked example of rl.types (prompt 5 6 7, completion 8 2) packed with another row."""
    prompts, completions = [[5, 6, 7], [1], [4, 4]], [[8, 2], [9], [3, 3, 2]]
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    borders = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    shifted = shift(torch.tensor(list(chain(*rows))), borders)
    index = completion_positions(torch.tensor([3, 1, 2]), torch.tensor([2, 1, 3]))
    assert shifted.targets[index].tolist() == list(chain(*completions))
    assert index.tolist()[:2] == [2, 3]


def test_suggested_chunk_fits_the_budget() -> None:
    assert suggest_chunk_tokens(131072, budget_bytes=2**31) == 2**31 // (12 * 131072)
    assert suggest_chunk_tokens(10**9) == 16
