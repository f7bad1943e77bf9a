"""squared_relu, launched."""

from __future__ import annotations

import torch

from effattn._triton.layout import with_mergeable_rows
from effattn.backends._memory import empty_image_in_order_of
from effattn.backends.triton._launch import Launchers, on_device_of, target


def forward(x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    from effattn._triton import squared_relu

    out = empty_image_in_order_of(x, x.shape)
    if x.numel() > 0:
        with on_device_of(x):
            squared_relu.forward(with_mergeable_rows(x), weight.contiguous(), out, scale, target(x))
    return out


def backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from effattn._triton import squared_relu

    grad_x, grad_weight = empty_image_in_order_of(x, x.shape), weight.new_empty(weight.shape)
    if x.numel() > 0:
        with on_device_of(x):
            squared_relu.backward(
                with_mergeable_rows(grad_out), with_mergeable_rows(x), weight.contiguous(), grad_x, grad_weight, scale,
                target(x),
            )  # fmt: skip
    else:
        grad_weight.zero_()
    return grad_x, grad_weight


LAUNCHERS = {
    "squared_relu": Launchers(forward, forward, backward),
}
