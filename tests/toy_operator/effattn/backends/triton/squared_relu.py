"""squared_relu, launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effattn.backends.triton._launch import Launchers


def forward(results: Sequence[torch.Tensor], x: torch.Tensor, weight: torch.Tensor, scale: float, target: Any) -> None:
    from effattn._triton import squared_relu

    squared_relu.forward(x, weight, *results, scale, target)


def backward(grads: Sequence[torch.Tensor], *arguments: Any) -> None:
    from effattn._triton import squared_relu

    *tensors, scale, target = arguments
    squared_relu.backward(*tensors, *grads, scale, target)


LAUNCHERS = {
    "squared_relu": Launchers(forward, backward),
}
