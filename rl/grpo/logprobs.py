"""Hidden states -> logprobs and entropies of the tokens that were sampled; the only shift between tokens and logits.

The logits of T tokens over a vocabulary of V are never all held: chunks of tokens go through `lm_head` one at a time
and, when there is more than one chunk, are computed again in the backward pass (16,384 tokens x 128k vocabulary would
be 4 GiB in bf16, and autograd through a plain log-softmax keeps several such arrays in fp32). Inside a chunk one
autograd function does with two fp32 arrays: the log-softmax, and softmax - onehot, which becomes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class ShiftedBatch:
    """Packed sequences, ready for the policy. inputs (T - S,): what is fed. targets (T - S,): the token that follows
    each input. cu_seqlens (S + 1,) int32 and max_seqlen: the borders of `inputs`."""

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def shift(tokens: Tensor, cu_seqlens: Tensor) -> ShiftedBatch:
    """Split packed sequences (T,) into what is fed and what follows it, within each sequence.

    The last token of a sequence is never fed and its first is never predicted, so S sequences of T tokens give T - S
    positions, and what the policy says at position i describes `targets[i]`. Every sequence needs at least one token.

    >>> s = shift(torch.tensor([5, 6, 7, 1, 2]), torch.tensor([0, 3, 5]))
    >>> s.inputs.tolist(), s.targets.tolist(), s.cu_seqlens.tolist(), s.max_seqlen
    ([5, 6, 1], [6, 7, 2], [0, 2, 3], 2)
    """
    lengths = cu_seqlens.diff()
    if tokens.dim() != 1 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens.numel():
        raise ValueError(f"cu_seqlens {cu_seqlens.tolist()} do not cover tokens of shape {tuple(tokens.shape)}")
    if bool((lengths < 1).any()):
        raise ValueError(f"sequence lengths {lengths.tolist()}: each must be at least 1")
    is_last = torch.zeros_like(tokens, dtype=torch.bool)
    is_last[cu_seqlens[1:].long() - 1] = True
    is_first = torch.zeros_like(is_last)
    is_first[cu_seqlens[:-1].long()] = True
    borders = cu_seqlens.to(torch.int32) - torch.arange(cu_seqlens.numel(), dtype=torch.int32, device=cu_seqlens.device)
    return ShiftedBatch(tokens[~is_last], tokens[~is_first], borders, int(lengths.max()) - 1)


def completion_positions(prompt_lengths: Tensor, completion_lengths: Tensor) -> Tensor:
    """Where, in shifted packed sequences, the completion tokens are predicted: (S,), (S,) int -> (sum of completion
    lengths,) int64.

    Row s is a prompt of P tokens and a completion of C, fed as P + C - 1 inputs; its completion tokens are the targets
    at P - 1 ... P + C - 2. Selecting these hidden states before `token_logprobs` leaves the prompts out of the
    vocabulary matmul.

    >>> completion_positions(torch.tensor([3, 1]), torch.tensor([2, 1])).tolist()    # inputs: 3 + 2 - 1 = 4, then 1
    [2, 3, 4]
    """
    device = prompt_lengths.device
    fed = prompt_lengths.long() + completion_lengths.long() - 1
    starts = fed.cumsum(0) - fed + prompt_lengths.long() - 1
    before = completion_lengths.long().cumsum(0) - completion_lengths.long()
    total = int(completion_lengths.sum())
    return torch.arange(total, device=device) + torch.repeat_interleave(starts - before, completion_lengths.long())


def token_logprobs(
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    num_chunks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprob of each target and entropy of its distribution: hidden (T, D), targets (T,) int64 -> ((T,), (T,))
    float32, nats.

    Row i is log softmax(lm_head(hidden[i]).float() / temperature)[targets[i]]: the distribution the engine samples
    from. Gradients flow through the logprobs; the entropy is a metric and carries none. `lm_head` is called as it is
    given (a module's hooks run: ZeRO-3 gathers its weight in them), with `chunk_tokens` rows at a time. Under ZeRO-3
    every rank must call it equally often: pass `num_chunks` (the largest ceil(T / chunk_tokens) over the ranks), and
    the tokens are split evenly into so many chunks, some of which may be empty. A single chunk is not recomputed: that
    would save no memory, since its backward is the first thing to run. Raises ValueError for a temperature <= 0 or
    shapes that do not match.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0 (score greedy samples with temperature 1)")
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)}: expected (T, D) and (T,)")
    if chunk_tokens < 1 or (num_chunks is not None and num_chunks < 1):
        raise ValueError(f"chunk_tokens={chunk_tokens}, num_chunks={num_chunks}: must be at least 1")
    total = hidden.shape[0]
    chunks = num_chunks or max(1, -(-total // chunk_tokens))
    size = max(1, -(-total // chunks))

    scored = []
    for i in range(chunks):
        rows, chosen = hidden[i * size : (i + 1) * size], targets[i * size : (i + 1) * size]
        score = _ChunkScorer(lm_head, temperature)
        if chunks > 1 and torch.is_grad_enabled():
            scored.append(checkpoint(score, rows, chosen, use_reentrant=False, preserve_rng_state=False))
        else:
            scored.append(score(rows, chosen))
    if chunks == 1:
        return scored[0]
    return torch.cat([logprobs for logprobs, _ in scored]), torch.cat([entropy for _, entropy in scored])


def suggest_chunk_tokens(vocab_size: int, *, budget_bytes: int = 2**31) -> int:
    """Rows per chunk whose working memory (bf16 logits and gradient, two fp32 arrays: 12 bytes an entry) fits the
    budget."""
    return max(16, budget_bytes // (12 * vocab_size))


class _ChunkScorer:
    """Scores one chunk; called a second time, by the backward pass, it leaves out the entropy, which has no
    gradient."""

    def __init__(self, lm_head: Callable[[Tensor], Tensor], temperature: float) -> None:
        self.lm_head = lm_head
        self.temperature = temperature
        self.called = False

    def __call__(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(rows)
        result: tuple[Tensor, Tensor] = _SelectLogprob.apply(logits, targets, self.temperature, not self.called)
        self.called = True
        return result


class _SelectLogprob(torch.autograd.Function):
    """logits (t, V), targets (t,), temperature -> (logprob (t,), entropy (t,)) in at least float32; entropy 0 unless
    asked."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        # one kernel reads the logits as they are and writes float32; the division would lose digits in bfloat16
        scores = logits if temperature == 1.0 else logits.to(dtype, copy=True).div_(temperature)
        table = torch.log_softmax(scores, -1, dtype=dtype)
        logprobs = table.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if with_entropy:  # -sum_v p_v log p_v as a batched dot product: no third (t, V) array
            entropy = -torch.bmm(table.exp().unsqueeze(1), table.unsqueeze(2)).flatten()
        else:
            entropy = torch.zeros_like(logprobs)
        ctx.save_for_backward(table, targets)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """d logprob / d logits = (onehot - softmax) / temperature."""
        table, targets = ctx.saved_tensors
        slope = (grads[0] / ctx.temperature).unsqueeze(-1)
        grad = table.exp().mul_(-slope)
        grad.scatter_add_(-1, targets.unsqueeze(-1), slope)
        return grad.to(ctx.dtype), None, None, None
