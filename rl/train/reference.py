"""The reference policy of the KL term, kept as a second set of weights that can be swapped into the policy for one forward.

No second module and no second DeepSpeed engine: under ZeRO-0/1/2 each parameter's storage is pointed at the copy for the
duration; under ZeRO-3 each rank keeps a copy of its own shard only, and the ordinary gathering brings the reference together.
R1-Zero replaced the reference with the newest policy every 400 steps (arXiv 2501.12948): `refresh`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class ReferenceWeights:
    """A frozen copy of `policy`'s weights, as they are now."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self.copies: dict[str, torch.Tensor] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take the policy's present weights."""
        self.copies = {name: holder.data.clone() for name, holder in self._holders()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within, the policy computes with the reference's weights."""
        holders = list(self._holders())
        current = [holder.data for _, holder in holders]
        for name, holder in holders:
            holder.data = self.copies[name]
        try:
            yield
        finally:
            for (_, holder), data in zip(holders, current, strict=True):
                holder.data = data

    def save(self, path: str) -> None:
        save_file({name: tensor.contiguous().cpu() for name, tensor in self.copies.items()}, path)

    def load(self, path: str) -> None:
        for name, tensor in load_file(path).items():
            self.copies[name] = tensor.to(self.copies[name].device)

    def _holders(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What holds this rank's numbers: the parameter; under ZeRO-3 its shard, and the parameter too where it stays whole."""
        for name, parameter in self.policy.named_parameters():
            shard = getattr(parameter, "ds_tensor", None)
            if shard is None:
                yield name, parameter
                continue
            yield f"{name}#shard", shard
            if parameter.numel() == parameter.ds_numel:  # small parameters persist ungathered under ZeRO-3
                yield name, parameter
