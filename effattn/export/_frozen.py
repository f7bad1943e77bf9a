"""Modules whose derived weights are constants: an exporter sees numbers, not how they were folded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effattn.nn import CascadedGroupAttention
from effattn.ops.cascaded_group_attention_projected import Weights


class _Frozen(CascadedGroupAttention):
    """With BatchNorm folded in; the bias of an image of another size than the table's is still gathered."""

    def _all_weights(self, size: tuple[int, int]) -> Weights:
        buffers = self._buffers
        found: Any = {
            name: buffers[f"frozen_{name}"]
            if f"frozen_{name}" in buffers
            else [buffers[f"frozen_{name}_{i}"] for i in range(self.num_heads)]
            for name in Weights._fields
        }
        is_own = size == (self.resolution, self.resolution)
        return Weights(**found) if is_own else Weights(**{**found, "bias": self._bias(size)})


@torch.no_grad()
def freeze_cascades(model: nn.Module) -> None:
    """Exchanges the classes of a model's cascades, in place, where their weights can be folded."""
    for module in model.modules():
        if type(module) is not CascadedGroupAttention or any(t.dtype != torch.float32 for t in module.parameters()):
            continue  # nodes are float32's
        weights = module._all_weights((module.resolution, module.resolution))
        if weights is None:
            continue
        for name, value in zip(Weights._fields, weights, strict=True):
            tensors = {"": value} if isinstance(value, torch.Tensor) else {f"_{i}": t for i, t in enumerate(value)}
            for i, t in tensors.items():
                module.register_buffer(f"frozen_{name}{i}", t.detach().contiguous(), persistent=False)
        module.__class__ = _Frozen
