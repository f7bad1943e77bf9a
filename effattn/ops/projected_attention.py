"""The operator behind the inference of EfficientFormer's attention: fake kernel and call; no autograd formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from effattn.backends.packed import OUTPUTS, joined, of_whole_heads, pack_projection, padded, rounded
from effattn.ops._memory import empty_in_order_of
from effattn.ops._operator import InferenceOperator

Pair = tuple[torch.Tensor, torch.Tensor]
_OPERATOR = InferenceOperator("projected_attention")
serves = _OPERATOR.serves


class Packed(NamedTuple):
    """Weights in float32 as the operator takes them.

    Args:
        qkv: (blocks, C, OUTPUTS): all heads' q, their k, then from a whole block on their v, channels of a head a
            multiple of CHANNELS; qkv_bias: (outputs of these,).
        bias: (heads, H * W, H * W).
        talking_heads: as of biased_attention, or empty.
        taps: of the values' depthwise convolution, (blocks, k * k, OUTPUTS); tap_bias (blocks * OUTPUTS,); or None.
        proj: of the last 1x1 convolution, (blocks, rounded(value_dim) * heads, OUTPUTS); proj_bias (outputs,); or None.
    """

    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    bias: torch.Tensor
    talking_heads: Sequence[torch.Tensor]
    taps: torch.Tensor | None
    tap_bias: torch.Tensor | None
    proj: torch.Tensor | None
    proj_bias: torch.Tensor | None
    key_dim: int
    value_dim: int


def pack(
    q: Pair,
    k: Pair,
    v: Pair,
    bias: torch.Tensor,
    *,
    talking_heads: Sequence[torch.Tensor] = (),
    local: Pair | None = None,
    proj: Pair | None = None,
) -> Packed:
    """Lays weights out once for many calls.

    Args:
        q, k, v: weight (heads * channels, C) and bias (heads * channels,) of 1x1 convolutions.
        bias: (heads, N, N).
        talking_heads: as of biased_attention.
        local: weight (heads * value_dim, 1, k, k) and bias of a depthwise convolution of v, added to the output.
        proj: weight (outputs, heads * value_dim) and bias of the last 1x1 convolution.
    """
    heads = bias.shape[0]
    key_dim, value_dim = len(k[1]) // heads, len(v[1]) // heads
    keys, values = heads * rounded(key_dim), heads * rounded(value_dim)
    sizes = [keys, rounded(2 * keys, OUTPUTS) - keys, values]
    weight, qkv_bias = (joined([of_whole_heads(part[i], heads) for part in (q, k, v)], sizes) for i in (0, 1))
    taps = tap_bias = matrix = proj_bias = None
    if local is not None:
        taps = pack_projection(of_whole_heads(local[0].flatten(1), heads))
        tap_bias = padded(of_whole_heads(local[1], heads), 0, rounded(values, OUTPUTS))
    if proj is not None:
        matrix, proj_bias = pack_projection(of_whole_heads(proj[0].mT, heads).mT), proj[1]
    return Packed(
        pack_projection(weight),
        qkv_bias,
        bias.contiguous(),
        list(talking_heads),
        taps,
        tap_bias,
        matrix,
        proj_bias,
        key_dim,
        value_dim,
    )


def projected_attention(x: torch.Tensor, packed: Packed, scale: float) -> torch.Tensor:
    """(B, C, H, W) -> (B, outputs, H, W): 1x1 convolution, biased_attention, depthwise convolution, 1x1 convolution."""
    return _OPERATOR(x, *packed, scale)


def _fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    packed, scale = Packed(*arguments[:-1]), arguments[-1]
    torch._check(x.dim() == 4, lambda: "x must have 4 dimensions (B, C, H, W)")
    torch._check(packed.bias.dim() == 3, lambda: "bias must have shape (heads, H * W, H * W)")
    torch._check(math.isfinite(scale), lambda: "scale must be finite")
    heads, tokens = packed.bias.shape[0], x.shape[2] * x.shape[3]
    torch._check(packed.bias.shape[1:] == (tokens, tokens), lambda: "bias must have shape (heads, H * W, H * W)")
    torch._check(packed.key_dim > 0 and packed.value_dim > 0, lambda: "key_dim and value_dim must be positive")
    keys, values = heads * rounded(packed.key_dim), heads * rounded(packed.value_dim)
    outputs = rounded(2 * keys, OUTPUTS) + values
    torch._check(
        packed.qkv.shape == (rounded(outputs, OUTPUTS) // OUTPUTS, x.shape[1], OUTPUTS),
        lambda: "qkv must have shape (blocks, C, OUTPUTS)",
    )
    torch._check(packed.qkv_bias.shape == (outputs,), lambda: "qkv_bias must have a number for each output")
    torch._check(len(packed.talking_heads) in (0, 4), lambda: "talking_heads must have no tensors or 4")
    out_channels = heads * packed.value_dim
    if packed.proj is not None:
        assert packed.proj_bias is not None
        out_channels = packed.proj_bias.shape[0]
        torch._check(
            packed.proj.shape == (rounded(out_channels, OUTPUTS) // OUTPUTS, values, OUTPUTS),
            lambda: "proj must have shape (blocks, heads * rounded(value_dim), OUTPUTS)",
        )
    return empty_in_order_of(x, (x.shape[0], out_channels, *x.shape[2:]))


_OPERATOR.register(_fake)
