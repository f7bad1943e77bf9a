"""cascaded_group_attention, launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effattn.backends.triton._launch import Launchers


def forward(results: Sequence[torch.Tensor], x: torch.Tensor, *rest: Any) -> None:
    from effattn._triton import cascaded_group_attention as kernels

    *weights, scale, height, width, target = rest
    kernels.forward(x, kernels.Weights(*weights), *results, scale, (height, width), target)


def backward(grads: Sequence[Any], grad_out: torch.Tensor, x: torch.Tensor, *rest: Any) -> None:
    from effattn._triton import cascaded_group_attention as kernels

    *weights, scale, height, width, target = rest
    own, of_weights = kernels.Weights(*weights), kernels.Weights(*grads[1:])
    kernels.backward(grad_out, x, own, grads[0], of_weights, scale, (height, width), target)


LAUNCHERS = {
    "cascaded_group_attention": Launchers(forward, backward),
}
