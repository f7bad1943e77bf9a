"""multi_scale_aggregation and multi_scale_linear_attention as torch sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from effattn.backends._memory import empty_image_in_order_of
from effattn.ops._operator import Operator

Tensors = Sequence[torch.Tensor]


def _check(
    qkv: torch.Tensor,
    dw: Tensors,
    pw: Tensors,
    dw_biases: Tensors,
    pw_biases: Tensors,
    head_dim: int,
    eps: float = 0.0,
) -> None:
    """Raises RuntimeError where the compiled operators would; effattn.functional says it in better words."""
    torch._check(qkv.dim() == 4, lambda: "qkv must have 4 dimensions (B, C, H, W)")
    torch._check(head_dim > 0, lambda: "head_dim must be positive")
    for weight in (*dw, *pw, *dw_biases, *pw_biases):
        torch._check(weight.device == qkv.device, lambda: "weights must be on qkv's device")
        torch._check(weight.dtype in (qkv.dtype, torch.float32), lambda: "weights must be float32 or of qkv's dtype")
    channels = qkv.shape[1]
    torch._check(channels % (3 * head_dim) == 0, lambda: "qkv must have a multiple of 3 * head_dim channels")
    torch._check(len(pw) == len(dw), lambda: "pw_weights must have as many tensors as dw_weights")
    for biases in (dw_biases, pw_biases):
        torch._check(len(biases) in (0, len(dw)), lambda: "biases must be empty or have a tensor a scale")
        for bias in biases:
            torch._check(bias.shape == (channels,), lambda: "biases must have shape (C,)")
    for depthwise, pointwise in zip(dw, pw, strict=True):
        kernel = depthwise.shape[-1]
        torch._check(
            depthwise.shape == (channels, 1, kernel, kernel), lambda: "dw_weights must have shape (C, 1, k, k)"
        )
        torch._check(kernel % 2 == 1, lambda: "dw_weights must have an odd k")
        torch._check(
            pointwise.shape == (channels, head_dim, 1, 1), lambda: "pw_weights must have shape (C, head_dim, 1, 1)"
        )
    torch._check(0 <= eps < math.inf, lambda: "eps must be a finite number >= 0")


def _aggregation_shape(qkv: torch.Tensor, dw: Tensors, *_: Any) -> tuple[int, ...]:
    return qkv.shape[0], (1 + len(dw)) * qkv.shape[1], *qkv.shape[2:]


def _attention_shape(qkv: torch.Tensor, dw: Tensors, *_: Any) -> tuple[int, ...]:
    return qkv.shape[0], (1 + len(dw)) * (qkv.shape[1] // 3), *qkv.shape[2:]


def _sums_shape(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int, eps: float
) -> tuple[int, ...]:
    return qkv.shape[0], (1 + len(dw)) * (qkv.shape[1] // (3 * head_dim)), head_dim + 1, head_dim


def _sizes(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int, *_: Any
) -> tuple[int, int, int]:
    return head_dim, max([0, *(weight.shape[-1] for weight in dw)]), len(dw)


multi_scale_aggregation = Operator(
    "multi_scale_aggregation", 1, 5, _check, _aggregation_shape, _sizes, empty=empty_image_in_order_of
)
multi_scale_linear_attention = Operator(
    "multi_scale_linear_attention", 1, 5, _check, _attention_shape, _sizes, _sums_shape, empty_image_in_order_of
)
multi_scale_aggregation.register()
multi_scale_linear_attention.register()
