"""cascaded_group_attention as torch sees it, and the operator behind its module's inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from effattn.ops._memory import empty_in_order_of
from effattn.ops._operator import InferenceOperator, Operator

Tensors = Sequence[torch.Tensor]


def _check(
    x: torch.Tensor,
    qkv: Tensors,
    qkv_biases: Tensors,
    dw: Tensors,
    dw_biases: Tensors,
    bias: torch.Tensor,
    scale: float,
    window_height: int,
    window_width: int,
) -> None:
    """Raises RuntimeError where the compiled operators would; effattn.functional says it in better words."""
    heads = len(qkv)
    torch._check(x.dim() == 4, lambda: "x must have 4 dimensions (B, C, H, W)")
    torch._check(heads > 0, lambda: "qkv_weights must have a tensor a head")
    torch._check(x.shape[1] % heads == 0, lambda: "x must have a multiple of the heads' number of channels")
    torch._check(window_height > 0 and window_width > 0, lambda: "window_size must be positive")
    torch._check(math.isfinite(scale), lambda: "scale must be finite")
    torch._check(len(dw) == heads, lambda: "q_dw_weights must have a tensor a head")
    for biases in (qkv_biases, dw_biases):
        torch._check(len(biases) in (0, heads), lambda: "biases must be empty or have a tensor a head")
    for t in (*qkv, *qkv_biases, *dw, *dw_biases, bias):
        torch._check(t.device == x.device, lambda: "weights must be on x's device")
        torch._check(t.dtype in (x.dtype, torch.float32), lambda: "weights must be float32 or of x's dtype")
    value_dim, key_dim, tokens = x.shape[1] // heads, dw[0].shape[0], window_height * window_width
    torch._check(key_dim > 0, lambda: "q_dw_weights must have shape (key_dim, 1, k, k)")
    outputs = 2 * key_dim + value_dim
    for weight in qkv:
        torch._check(
            weight.shape == (outputs, value_dim, 1, 1),
            lambda: "qkv_weights must have shape (2 * key_dim + C / heads, C / heads, 1, 1)",
        )
    for weight in dw:
        kernel = weight.shape[-1]
        torch._check(
            weight.shape == (key_dim, 1, kernel, kernel) and kernel % 2 == 1,
            lambda: "q_dw_weights must have shape (key_dim, 1, k, k) with an odd k",
        )
    for part, size in ((qkv_biases, outputs), (dw_biases, key_dim)):
        for t in part:
            torch._check(t.shape == (size,), lambda: "biases must have a number for each output")
    torch._check(bias.shape == (heads, tokens, tokens), lambda: "attention_bias must have shape (heads, N, N)")


def _fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return empty_in_order_of(x, x.shape)


cascaded_group_attention = Operator("cascaded_group_attention", 1, 6, _check, _fake)
cascaded_group_attention.register()


# --- with relu and the projection behind it, for inference ---------------------------------------------------

_PROJECTED = InferenceOperator("cascaded_group_attention_projected")
serves = _PROJECTED.serves


class Weights(NamedTuple):
    """Of the module, float32.

    Args:
        qkv, qkv_biases, dw, dw_biases, bias: as in cascaded_group_attention.
        proj_weight: (outputs, C); proj_bias of as many outputs, or None.
    """

    qkv: Tensors
    qkv_biases: Tensors
    dw: Tensors
    dw_biases: Tensors
    bias: torch.Tensor
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor | None


def projected(x: torch.Tensor, weights: Weights, scale: float, window_height: int, window_width: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, outputs, H, W): cascaded_group_attention, relu, 1x1 convolution."""
    return _PROJECTED(x, *weights, scale, window_height, window_width)


def _fake_projected(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    weights, options = Weights(*arguments[:-3]), arguments[-3:]
    _check(x, *weights[:5], *options)
    torch._check(weights.proj_weight.dim() == 2, lambda: "proj_weight must have 2 dimensions (outputs, C)")
    outputs, inputs = weights.proj_weight.shape
    torch._check(inputs == x.shape[1], lambda: "proj_weight must have shape (outputs, C)")
    bias = weights.proj_bias
    torch._check(bias is None or bias.shape == (outputs,), lambda: "proj_bias must have shape (outputs,)")
    return empty_in_order_of(x, (x.shape[0], outputs, *x.shape[2:]))


_PROJECTED.register(_fake_projected)
