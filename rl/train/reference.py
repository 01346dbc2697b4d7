"""The reference policy of the KL term, kept as a second set of weights (and router biases) that can be swapped into the
policy for one forward.

No second module and no second DeepSpeed engine: under ZeRO-0/1/2 each parameter's storage is pointed at the copy for
the duration; under ZeRO-3 each rank keeps a copy of its own shard only, and the ordinary gathering brings the reference
together. R1-Zero replaced the reference with the newest policy every 400 steps (arXiv 2501.12948): `refresh`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class ReferenceWeights:
    """A frozen copy of `policy`'s weights, as they are now."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self.copies = {name: holder.data.clone() for name, holder in self._holders()}

    def refresh(self) -> None:
        """Take the policy's present weights, in the memory of the old ones."""
        for name, holder in self._holders():
            self.copies[name].copy_(holder.data)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within, the policy computes with the reference's weights."""
        holders = list(self._holders())
        current = [holder.data for _, holder in holders]
        for name, holder in holders:
            holder.data = self.copies[name]
        self._forget_gathered()
        try:
            yield
        finally:
            for (_, holder), data in zip(holders, current, strict=True):
                holder.data = data
            self._forget_gathered()

    def save(self, path: str) -> None:
        save_file({name: tensor.contiguous().cpu() for name, tensor in self.copies.items()}, path)

    def load(self, path: str) -> None:
        for name, tensor in load_file(path).items():
            self.copies[name].copy_(tensor)

    def _holders(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What holds this rank's numbers: the parameter, or its shard under ZeRO-3; and the routers' biases, which move
        where the recipe balances load."""
        for name, parameter in self.policy.named_parameters():
            yield name, getattr(parameter, "ds_tensor", parameter)
        persistent = self.policy.state_dict().keys()
        yield from ((name, buffer) for name, buffer in self.policy.named_buffers() if name in persistent)

    def _forget_gathered(self) -> None:
        """ZeRO-3 keeps small parameters gathered between uses: let go of them, so that the next use reads the shards
        anew."""
        parameters: list[Any] = list(self.policy.parameters())
        for parameter in parameters:
            if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
                parameter.ds_active_sub_modules.clear()
                parameter.partition(has_been_updated=False)
