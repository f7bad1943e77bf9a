"""cascaded_group_attention, launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effattn._triton.layout import with_mergeable_rows
from effattn.backends._memory import empty_image_in_order_of
from effattn.backends.triton._launch import Launchers, on_device_of, target

Tensors = Sequence[torch.Tensor]


def forward(
    x: torch.Tensor,
    qkv: Tensors,
    qkv_biases: Tensors,
    dw: Tensors,
    dw_biases: Tensors,
    attention_bias: torch.Tensor,
    scale: float,
    window_height: int,
    window_width: int,
) -> torch.Tensor:
    from effattn._triton import cascaded_group_attention as kernels

    out = empty_image_in_order_of(x, x.shape)
    if x.numel() > 0:
        weights = kernels.Weights(qkv, qkv_biases, dw, dw_biases, attention_bias.contiguous())
        with on_device_of(x):
            window = (window_height, window_width)
            kernels.forward(with_mergeable_rows(x), weights, out, scale, window, target(x))
    return out


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    qkv: Tensors,
    qkv_biases: Tensors,
    dw: Tensors,
    dw_biases: Tensors,
    attention_bias: torch.Tensor,
    scale: float,
    window_height: int,
    window_width: int,
) -> tuple[torch.Tensor | list[torch.Tensor], ...]:
    from effattn._triton import cascaded_group_attention as kernels

    new = torch.Tensor.new_zeros if x.numel() == 0 else torch.Tensor.new_empty
    grad_x, lists = empty_image_in_order_of(x, x.shape), (qkv, qkv_biases, dw, dw_biases)
    grads = kernels.Weights(
        *([new(t, t.shape) for t in tensors] for tensors in lists), new(attention_bias, attention_bias.shape)
    )
    if x.numel() > 0:
        weights = kernels.Weights(*lists, attention_bias.contiguous())
        with on_device_of(x):
            kernels.backward(
                with_mergeable_rows(grad_out), with_mergeable_rows(x), weights, grad_x, grads, scale,
                (window_height, window_width), target(x),
            )  # fmt: skip
    return grad_x, *(list(t) for t in (grads.qkv, grads.qkv_biases, grads.dw, grads.dw_biases)), grads.bias


LAUNCHERS = {
    "cascaded_group_attention": Launchers(forward, forward, backward),
}
