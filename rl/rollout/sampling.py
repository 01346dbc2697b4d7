"""Drawing one token per row, with randomness that depends on (row seed, step, vocabulary id) and nothing else.

In: logits (N, V) of the next token, one 64-bit seed and one step index per row. Out: token (N,) and its log-probability
(N,) under the distribution that was drawn from. The draw is a Gumbel-max race (argmax of log p + Gumbel noise,
Maddison et al. 2014, arXiv:1411.0030): no cumulative sum, so rounding in the logits can change a token only where two
candidates tie, and a row's result cannot depend on its neighbours. The noise is SplitMix64 (Steele et al. 2014) used
as a counter-based generator: no state is carried, so a killed run draws the same tokens again and torch's own
generators stay untouched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rl.types import SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def to_int64(value: int) -> int:
    """The 64 low bits of `value` read as a signed integer, which is how torch holds them."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    # int64's >> copies the sign bit; SplitMix64 wants zeros.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function on int64 tensors (multiplication wraps)."""
    x = (x ^ _shift_right(x, 30)) * to_int64(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * to_int64(_MIX_2)
    return x ^ _shift_right(x, 31)


def row_keys(seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """(N,) int64 seeds and step indices -> (N,) int64, the starting point of each row's noise at this step."""
    return _splitmix64(_splitmix64(seeds + to_int64(_GOLDEN)) + steps * to_int64(_GOLDEN))


def exponential_noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(N,) row keys -> (N, V) float32 draws of Exp(1), one per vocabulary id.

    Uses -log1p(-u) with u = (32 bits + 1/2) / 2^32, so the small draws (they win the race) keep full float resolution.
    """
    ids = torch.arange(1, vocab_size + 1, device=keys.device) * to_int64(_GOLDEN)
    bits = _shift_right(_splitmix64(keys[:, None] + ids), 32)
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


@dataclass(frozen=True, slots=True)
class Sampler:
    """How logits become a token: the part of `SamplingParams` that concerns one draw. temperature 0 means greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def from_params(cls, params: SamplingParams) -> Sampler:
        """Checks the ranges; ValueError names the field."""
        if not (params.temperature == 0 or 1e-30 <= params.temperature < math.inf):  # below, quotients overflow to NaN
            raise ValueError(
                f"SamplingParams.temperature = {params.temperature}: must be 0 (greedy) or finite and at least 1e-30"
            )
        if not 0 < params.top_p <= 1:
            raise ValueError(f"SamplingParams.top_p = {params.top_p}: must be in (0, 1] (1 is off)")
        if params.top_k < 0:
            raise ValueError(f"SamplingParams.top_k = {params.top_k}: must be >= 0 (0 is off)")
        if not 0 <= params.min_p < 1:
            raise ValueError(f"SamplingParams.min_p = {params.min_p}: must be in [0, 1) (0 is off)")
        return cls(params.temperature, params.top_p, params.top_k, params.min_p)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def __call__(
        self, logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (N, V) any float dtype, seeds and steps (N,) int64 -> token (N,) int64, logprob (N,) float32."""
        logprobs = sampling_logprobs(logits, self)
        if self.greedy:
            tokens = logprobs.argmax(-1)
        else:
            noise = exponential_noise(row_keys(seeds, steps), logits.shape[-1])
            tokens = (logprobs - noise.log_()).argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def sampling_logprobs(logits: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    """The log-distribution that is drawn from: (N, V) logits -> (N, V) float32, -inf where cut off.

    Order as in Hugging Face: temperature, then top-k, then top-p, then min-p, each on what the one before left. Ties at
    a threshold are all kept for top-k and min-p; top-p keeps the smallest prefix (most likely first) that reaches
    top_p.
    """
    if sampler.greedy:
        return torch.log_softmax(logits.float(), dim=-1)
    logits = logits.float() if sampler.temperature == 1 else logits.float() / sampler.temperature
    if sampler.truncates:
        logits = _truncate(logits, sampler)
    return torch.log_softmax(logits, dim=-1)


def _truncate(logits: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    if 0 < sampler.top_k < logits.shape[-1]:
        threshold = logits.topk(sampler.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampler.top_p < 1:
        ordered, index = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # A token goes when those before it already hold top_p of the mass; before the first there is none.
        cut = ordered.cumsum(-1) - ordered >= sampler.top_p
        logits = logits.masked_fill(torch.zeros_like(cut).scatter_(1, index, cut), float("-inf"))
    if sampler.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampler.min_p * probs.amax(-1, keepdim=True), float("-inf"))
    return logits
