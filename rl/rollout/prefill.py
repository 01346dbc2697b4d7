"""Prompts through the policy once per group: packed, in chunks of bounded size, into the latent cache.

The policy's own forward does it (expanded MLA), so what prompts leave in the cache is exactly what training would
compute. Kept besides the latents: the logits after the last prompt token, from which every completion of the group
draws its first token, and the experts that the prompt tokens went through.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from rl.rollout.cache import LatentCache
from rl.rollout.scheduler import Group
from rl.rollout.transfer import to_device, to_host


class Prefill:
    """column_order: see `Decoder.column_order`. chunk_tokens: most prompt tokens in one forward (a longer prompt goes
    alone). one_by_one: never pack prompts together, so that rounding cannot depend on which prompts were admitted at
    once."""

    def __init__(
        self,
        policy: Any,
        cache: LatentCache,
        *,
        column_order: torch.Tensor | None,
        chunk_tokens: int,
        routes_dtype: torch.dtype,
        one_by_one: bool = False,
    ) -> None:
        head, device = policy.lm_head.weight, cache.own.device
        self._policy, self._cache = policy, cache
        self._chunk_tokens = 0 if one_by_one else chunk_tokens
        self._routes_dtype = routes_dtype
        self._columns = column_order
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
        device = self._cache.own.device
        lengths = [len(group.prompt_ids) for group in groups]
        tokens = to_device([token for group in groups for token in group.prompt_ids], device, torch.int64)
        ends = to_device([0, *accumulate(lengths)], device, torch.int32)
        slots = [group.prompt_slot for group in groups]
        stride = self._cache.shape.prompt_tokens
        places = torch.cat(
            [torch.arange(n) + slot * stride for n, slot in zip(lengths, slots, strict=True) if slot is not None]
        )
        places = to_device(places, device, torch.int64)
        latents: list[torch.Tensor] = []
        hidden, routes = self._policy(tokens, ends, max(lengths), latents=latents)
        self._cache.store_prompts(latents, places, self._columns)
        last = hidden.index_select(0, ends[1:].long() - 1)
        self.logits[to_device(slots, device, torch.int64)] = self._policy.lm_head(last)
        return None if routes is None else routes.to(self._routes_dtype)
