"""Prompts through the policy once per group: packed, in chunks of bounded size, into the latent cache.

The policy's own forward does it (expanded MLA), so what prompts leave in the cache is what training would compute. A
GPU is given small chunks in fewer launches by `lean`, the same computation, rounded as the decode step does. Kept
besides the latents: the logits after the last prompt token, from which every completion of the group draws its first
token, and the experts that the prompt tokens went through.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch

from rl.rollout.cache import LatentCache
from rl.rollout.scheduler import Group
from rl.rollout.transfer import to_device, to_host

# Chunks of at most so many tokens take the lean way. On an H200 the policy's forward keeps the host busy for 2.5 ms a
# layer; the device needs 1.6 us a token for 12 layers of a 1.6B, 9.5 us for 27 of a Moonlight, so it catches up at
# 16,000 and 7,000 tokens.
LEAN_TOKENS = 8192
_ALIGNED = 16  # numbers: where a part of `_Packed` may begin, so that kernels are compiled for one alignment


class LeanPrefill(Protocol):
    """`rl.rollout.kernels.prefill.FusedPrefill`, in which it is described."""

    def __call__(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        positions: torch.Tensor,
        slots: torch.Tensor,
        prompt: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


@dataclass(frozen=True, slots=True)
class _Packed:
    """S prompts, T tokens, in one transfer; all int32 on the device. tokens, positions, slots: (T,), the prompt slot of
    each token. cu_seqlens: (S + 1,). prompt_slots: (S,)."""

    max_seqlen: int
    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    cu_seqlens: torch.Tensor
    prompt_slots: torch.Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device) -> _Packed:
        lengths = [len(group.prompt_ids) for group in groups]
        longest = max(lengths)
        counting = array("i", range(longest))
        tokens, positions, slots, own_slots = array("i"), array("i"), array("i"), array("i")
        for group, length in zip(groups, lengths, strict=True):
            assert group.prompt_slot is not None
            tokens.extend(group.prompt_ids)
            positions.extend(counting[:length])
            slots.extend(array("i", (group.prompt_slot,)) * length)
            own_slots.append(group.prompt_slot)
        parts = (tokens, positions, slots, array("i", accumulate(lengths, initial=0)), own_slots)
        packed, starts = array("i"), []
        for part in parts:
            starts.append(len(packed))
            packed.extend(part)
            packed.extend(array("i", (0,)) * (-len(packed) % _ALIGNED))
        there = to_device(torch.frombuffer(packed, dtype=torch.int32), device, torch.int32)
        views = [there[start : start + len(part)] for start, part in zip(starts, parts, strict=True)]
        return cls(longest, *views)


class Prefill:
    """column_order: see `Decoder.column_order`. chunk_tokens: most prompt tokens in one forward (a longer prompt goes
    alone). one_by_one: never pack prompts together, so that rounding cannot depend on which prompts were admitted at
    once. lean: takes chunks of at most `lean_tokens` tokens; None: the policy's forward takes all."""

    def __init__(
        self,
        policy: Any,
        cache: LatentCache,
        *,
        column_order: torch.Tensor | None,
        chunk_tokens: int,
        routes_dtype: torch.dtype,
        one_by_one: bool = False,
        lean: LeanPrefill | None = None,
        lean_tokens: int = LEAN_TOKENS,
    ) -> None:
        head, device = policy.lm_head.weight, cache.own.device
        self._policy, self._cache = policy, cache
        self._chunk_tokens = 0 if one_by_one else chunk_tokens
        self._routes_dtype = routes_dtype
        self._columns = column_order
        assert lean is None or column_order is None, "the lean prefill writes the policy's own order of columns"
        self._lean, self._lean_tokens = lean, lean_tokens
        # (prompt_slots, V): next-token logits of the prompts in flight
        self.logits = torch.zeros(cache.shape.prompt_slots, head.shape[0], dtype=head.dtype, device=device)

    def run(self, groups: Sequence[Group]) -> dict[int, torch.Tensor]:
        """Prefill the prompts of `groups` into their prompt slots -> by group index, routes (P, Lm, K) on the host
        (none for a policy without experts). Only queued: the routes are there when the device has come so far."""
        routes: dict[int, torch.Tensor] = {}
        for chunk in self._chunks(sorted(groups, key=lambda group: len(group.prompt_ids))):
            used = self._forward(chunk)
            if used is not None:
                parts = to_host(used).split([len(group.prompt_ids) for group in chunk])
                routes |= {group.index: part for group, part in zip(chunk, parts, strict=True)}
        return routes

    def _chunks(self, groups: Sequence[Group]) -> list[list[Group]]:
        chunks: list[list[Group]] = []
        room = 0
        for group in groups:
            length = len(group.prompt_ids)
            if not chunks or length > room:
                chunks.append([])
                room = self._chunk_tokens
            chunks[-1].append(group)
            room -= length
        return chunks

    def _forward(self, groups: list[Group]) -> torch.Tensor | None:
        """-> routes of the packed prompts (T, Lm, K) on the device, or None."""
        packed = _Packed.of(groups, self._cache.own.device)
        if self._lean is not None and packed.tokens.shape[0] <= self._lean_tokens:
            logits, routes = self._lean(
                packed.tokens, packed.cu_seqlens, packed.max_seqlen, packed.positions, packed.slots, self._cache.prompt
            )
        else:
            logits, routes = self._policy_forward(packed)
        self.logits.index_copy_(0, packed.prompt_slots.long(), logits)
        return routes

    def _policy_forward(self, packed: _Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `LeanPrefill`."""
        latents: list[torch.Tensor] = []
        hidden, routes = self._policy(packed.tokens, packed.cu_seqlens, packed.max_seqlen, latents=latents)
        places = packed.slots.long() * self._cache.shape.prompt_tokens + packed.positions
        self._cache.store_prompts(latents, places, self._columns)
        logits = self._policy.lm_head(hidden.index_select(0, packed.cu_seqlens[1:] - 1))
        return logits, None if routes is None else routes.to(self._routes_dtype)
