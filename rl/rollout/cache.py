"""The latent cache of one rollout: C + R numbers per token and layer, prompts stored once per group.

    own     (L, slots, T_own, C+R)          what a row has sampled so far; row r of the batch lives in slot r
    prompt  (L, prompt_slots, T_prompt, C+R)  one slot per group in flight, shared by its rows

A cache row is the normalised latent followed by the rotated key. The policy's forward returns the key's RoPE pairs in
halves; the torch decoder wants partners adjacent (one complex product turns them), so `store_prompts` can reorder
columns. Memory is taken when a rollout starts and released after it. `plan_cache` fits slots into a budget of bytes:
a small one makes prompts wait; one in which not even a single row fits is a user error.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rl.distributed import local_world_size
from rl.rollout.arena import Zeros

# Prompts are padded to a multiple of this, so that a row's own tokens meet the same vector lanes of the softmax
# whatever the longest prompt beside it (bit-equal sums), and kernels get aligned rows.
LENGTH_MULTIPLE = 16
_FREE_SHARE = 0.6  # of the free memory, when the recipe names no budget: prefill and logits need the rest
_CPU_MOST = 2**32  # bytes, however much memory is free


@dataclass(frozen=True, slots=True)
class CacheShape:
    """slots: rows at once. prompt_slots: groups at once. Lengths in tokens."""

    slots: int
    prompt_slots: int
    own_tokens: int
    prompt_tokens: int


def plan_cache(
    *,
    requests: int,
    group: int,
    rows: int,
    own_tokens: int,
    prompt_tokens: int,
    token_bytes: int,
    row_bytes: int,
    prompt_bytes: int,
    budget: int,
    row_multiple: int = 1,
) -> CacheShape:
    """The largest cache for at most `rows` rows of `requests` groups of up to `group` rows within `budget` bytes.

    token_bytes: cache bytes per token over all layers. row_bytes, prompt_bytes: what else a row (outputs, routes) or a
    prompt (its next-token logits) takes. Besides ceil(slots / group) prompt slots there are half as many for groups
    that linger on a last row, or three times as many where that leaves half of the budget free (with skewed lengths
    most groups linger, and rows that wait for a prompt slot leave their own slots empty). `slots` is a multiple of
    row_multiple. ValueError names rollout.cache_bytes when not even the smallest rows fit."""
    prompt_tokens = -(-prompt_tokens // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    per_slot = own_tokens * token_bytes + row_bytes
    per_prompt = prompt_tokens * token_bytes + prompt_bytes

    def prompts_for(slots: int) -> int:
        return min(requests, -(-slots // group) * 3 // 2 + 1)

    def fits(slots: int) -> bool:
        return slots * per_slot + prompts_for(slots) * per_prompt <= budget

    most = -(-rows // row_multiple) * row_multiple
    generous = min(requests, -(-most // group) * 4 + 1)
    if most * per_slot + generous * per_prompt <= budget // 2:
        return CacheShape(most, generous, own_tokens, prompt_tokens)
    if not fits(row_multiple):
        least = row_multiple * per_slot + per_prompt
        if least > budget:
            raise ValueError(
                f"rollout.cache_bytes = {budget}: must be at least {least}, what {row_multiple} row(s) of "
                f"{prompt_tokens} prompt and {own_tokens} new tokens take"
            )
        prompt_slots = min(requests, (budget - row_multiple * per_slot) // per_prompt)
        return CacheShape(row_multiple, prompt_slots, own_tokens, prompt_tokens)
    candidates = range(row_multiple, rows + row_multiple, row_multiple)
    slots = candidates[bisect_left(candidates, True, key=lambda n: not fits(n)) - 1]
    return CacheShape(slots, prompts_for(slots), own_tokens, prompt_tokens)


def free_memory(device: torch.device) -> int:
    """Bytes that a cache may take when the recipe names no budget.

    On the CPU: an equal share for each process of this machine of what it, or the container, can still give (file cache
    counts as free), and at most 4 GiB. The budget decides which rows share a batch, and that their rounding; below the
    cap a resumed run could differ in its last bits from one that was never killed, so the cap is low enough that only
    a machine that is really short of memory gets there. On a GPU: a share of what is free or held unused by this
    process, which depends on its neighbours; name rollout.cache_bytes where that matters."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        stuck = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)  # beside what is in use
        return int((free + max(held - stuck, 0)) * _FREE_SHARE)
    available = min([psutil.virtual_memory().available, *_cgroup_room()])
    return min(int(available * _FREE_SHARE) // local_world_size(), _CPU_MOST)


def _cgroup_room(memberships: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes left under each memory limit that Linux holds this process to, by version 2 or 1 of its control groups.

    Looks from the process's own group up to the mount: a container may see the host's name of its group, which does not
    exist inside, while its limit lies at the top."""
    if not memberships.exists():
        return
    for line in memberships.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            top, limit, used = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = top / name.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(top) and (group / limit).exists():
                most = (group / limit).read_text().strip()
                if most != "max":
                    yield int(most) - int((group / used).read_text()) + _file_cache(group / "memory.stat")


def _file_cache(stat: Path) -> int:
    """Bytes of a control group's use that the kernel gives back when asked. Version 1 counts subgroups apart."""
    counts = dict(line.split() for line in stat.read_text().splitlines())
    return sum(int(counts.get(f"total_{kind}", counts[kind])) for kind in ("active_file", "inactive_file"))


class LatentCache:
    """The two tensors and the three things done to them besides attention: store prompts, store a step, move rows."""

    def __init__(self, shape: CacheShape, *, layers: int, width: int, dtype: torch.dtype, zeros: Zeros) -> None:
        self.shape = shape
        # Zeros, not empty: masked positions are multiplied by a probability of 0, and 0 * NaN would be NaN.
        self.own = zeros((layers, shape.slots, shape.own_tokens, width), dtype)
        self.prompt = zeros((layers, shape.prompt_slots, shape.prompt_tokens, width), dtype)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.own, self.prompt))

    def store_prompts(
        self, latents: list[torch.Tensor], places: torch.Tensor, column_order: torch.Tensor | None
    ) -> None:
        """latents: per layer (T, C+R) as the policy's forward returns them; places (T,): slot * prompt_tokens +
        position; column_order (C+R,): where each stored column stands in the policy's row, if it differs."""
        for layer, latent in zip(self.prompt, latents, strict=True):
            rows = latent if column_order is None else latent.index_select(1, column_order)
            layer.view(-1, layer.shape[-1]).index_copy_(0, places, rows.to(layer.dtype))

    def move(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Copy the first `length` tokens of rows `source` to rows `target` (disjoint)."""
        self.own[:, target, :length] = self.own[:, source, :length]
