"""cascaded_group_attention as torch sees it, and the operators behind its module's training and inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from effattn.backends._memory import empty_image_in_order_of
from effattn.backends.packed import OUTPUTS, joined, pack_projection, padded, rounded
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
    torch._check(-math.inf < scale < math.inf, lambda: "scale must be finite")
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


def _shape(x: torch.Tensor, *_: Any) -> tuple[int, ...]:
    return tuple(x.shape)


def _sizes(
    x: torch.Tensor, qkv: Tensors, qkv_biases: Tensors, dw: Tensors, dw_biases: Tensors, bias: torch.Tensor, *_: Any
) -> tuple[int, int, int, int]:
    return x.shape[1] // len(qkv), dw[0].shape[0], max([weight.shape[-1] for weight in dw]), len(qkv)


cascaded_group_attention = Operator(
    "cascaded_group_attention", 1, 6, _check, _shape, _sizes, empty=empty_image_in_order_of
)
cascaded_group_attention.register()


# --- with BatchNorm inside, for training -----------------------------------------------------------------------


def _check_batch_norm(
    x: torch.Tensor,
    qkv: Tensors,
    dw: Tensors,
    norm_weights: Tensors,
    norm_biases: Tensors,
    bias: torch.Tensor,
    eps: Sequence[float],
    scale: float,
    window_height: int,
    window_width: int,
) -> None:
    _check(x, qkv, (), dw, (), bias, scale, window_height, window_width)
    torch._check(x.shape[2] % window_height == 0, lambda: "x must have whole windows")
    torch._check(x.shape[3] % window_width == 0, lambda: "x must have whole windows")
    torch._check(x.numel() > 0, lambda: "x must not be empty")
    heads, key_dim = len(qkv), dw[0].shape[0]
    torch._check(len(eps) == 2 * heads, lambda: "eps must have two numbers a head")
    for norms in (norm_weights, norm_biases):
        torch._check(len(norms) == 2 * heads, lambda: "norms must have two tensors a head")
        for i, t in enumerate(norms):
            outputs = qkv[0].shape[0] if i < heads else key_dim
            torch._check(t.shape == (outputs,), lambda: "norms must have a number for each output")
            torch._check(t.dtype in (x.dtype, torch.float32), lambda: "norms must be float32 or of x's dtype")


def _statistics_shape(x: torch.Tensor, qkv: Tensors, dw: Tensors, *_: Any) -> tuple[int, ...]:
    return len(qkv), 2, qkv[0].shape[0] + dw[0].shape[0]


#: (x, qkv_weights, q_dw_weights, norm_weights, norm_biases, attention_bias, eps, scale, window_height, window_width) ->
#: (out, statistics): windows divide the image; norms and their eps are those behind the projections, then those behind
#: the convolutions; statistics (heads, 2, outputs + key_dim) are means, then variances over the batch (not corrected).
batch_norm = Operator(
    "cascaded_group_attention_batch_norm",
    1,
    6,
    _check_batch_norm,
    _shape,
    lambda *_: (),
    _statistics_shape,
    empty_image_in_order_of,
    whole=True,
)
batch_norm.register()


# --- with relu and the projection behind it, for inference ---------------------------------------------------

_PROJECTED = InferenceOperator("cascaded_group_attention_projected")
serves = _PROJECTED.serves


class Weights(NamedTuple):
    """Of the module.

    Args:
        qkv, qkv_biases, dw, dw_biases, bias: as in cascaded_group_attention.
        proj_weight: (outputs, C).
        proj_bias: (outputs,).
    """

    qkv: Tensors
    qkv_biases: Tensors
    dw: Tensors
    dw_biases: Tensors
    bias: torch.Tensor
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor


class Packed(NamedTuple):
    """Weights in float32 as the operator takes them.

    Args:
        qkv: (heads, C / heads, q | k | v), each of q, k and v a multiple of CHANNELS; qkv_bias (heads, q | k | v).
        taps: (all heads' k * k, rounded(key_dim)); tap_bias (heads, rounded(key_dim)).
        bias: (heads, N, N).
        proj: (blocks, C, OUTPUTS); proj_bias (outputs,).
        kernels: k of each head.
    """

    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    taps: torch.Tensor
    tap_bias: torch.Tensor
    bias: torch.Tensor
    proj: torch.Tensor
    proj_bias: torch.Tensor
    kernels: list[int]
    key_dim: int


def pack(weights: Weights) -> Packed:
    """Lays weights out once for many calls."""
    key_dim, keys = weights.dw[0].shape[0], rounded(weights.dw[0].shape[0])
    value_dim = weights.qkv[0].shape[1]
    dims, sizes = [key_dim, key_dim, value_dim], [keys, keys, rounded(value_dim)]
    return Packed(
        torch.stack([joined(weight.flatten(1).split(dims), sizes).mT for weight in weights.qkv]).contiguous(),
        torch.stack([joined(bias.split(dims), sizes) for bias in weights.qkv_biases]),
        torch.cat([padded(taps.flatten(1), 0, keys).mT for taps in weights.dw]).contiguous(),
        torch.stack([padded(bias, 0, keys) for bias in weights.dw_biases]),
        weights.bias.contiguous(),
        pack_projection(weights.proj_weight),
        weights.proj_bias,
        [taps.shape[-1] for taps in weights.dw],
        key_dim,
    )


def projected(x: torch.Tensor, packed: Packed, scale: float, window_height: int, window_width: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, outputs, H, W): cascaded_group_attention, relu, 1x1 convolution."""
    return _PROJECTED(x, *packed, scale, window_height, window_width)


def _fake_projected(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    packed, (scale, window_height, window_width) = Packed(*arguments[:-3]), arguments[-3:]
    torch._check(x.dim() == 4, lambda: "x must have 4 dimensions (B, C, H, W)")
    heads, key_dim, tokens = len(packed.kernels), packed.key_dim, window_height * window_width
    torch._check(heads > 0 and key_dim > 0, lambda: "kernels must have a size a head and key_dim be positive")
    torch._check(x.shape[1] % heads == 0, lambda: "x must have a multiple of the heads' number of channels")
    torch._check(window_height > 0 and window_width > 0, lambda: "window_size must be positive")
    torch._check(-math.inf < scale < math.inf, lambda: "scale must be finite")
    value_dim, taps = x.shape[1] // heads, sum(k * k for k in packed.kernels)
    stride = 2 * rounded(key_dim) + rounded(value_dim)
    torch._check(packed.proj_bias.dim() == 1, lambda: "proj_bias must have 1 dimension (outputs)")
    outputs = packed.proj_bias.shape[0]
    shapes = (
        (heads, value_dim, stride),
        (heads, stride),
        (taps, rounded(key_dim)),
        (heads, rounded(key_dim)),
        (heads, tokens, tokens),
        (rounded(outputs, OUTPUTS) // OUTPUTS, x.shape[1], OUTPUTS),
    )
    for name, shape in zip(Packed._fields, shapes, strict=False):
        torch._check(getattr(packed, name).shape == shape, lambda name=name, shape=shape: f"{name} must be {shape}")
    return empty_image_in_order_of(x, (x.shape[0], outputs, *x.shape[2:]))


_PROJECTED.register(_fake_projected)
