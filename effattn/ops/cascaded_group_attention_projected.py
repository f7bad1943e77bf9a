"""cascaded_group_attention, relu and the 1x1 convolution behind it, in evaluation, with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from effattn.ops import cascaded_group_attention
from effattn.ops._operator import InferenceOperator
from effattn.ops._packed import joined, pack_projection, padded, rounded, unpack_projection
from effattn.ops._plain import project

Tensors = Sequence[torch.Tensor]

SCHEMA = (
    "(Tensor x, Tensor qkv, Tensor qkv_bias, Tensor taps, Tensor tap_bias, Tensor attention_bias, Tensor proj, "
    "Tensor proj_bias, int[] kernels, int key_dim, float scale, int window_height, int window_width) -> Tensor"
)


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
    return OPERATOR(x, *packed, scale, window_height, window_width)


def plain(
    x: torch.Tensor,
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor,
    taps: torch.Tensor,
    tap_bias: torch.Tensor,
    attention_bias: torch.Tensor,
    proj: torch.Tensor,
    proj_bias: torch.Tensor,
    kernels: Sequence[int],
    key_dim: int,
    scale: float,
    window_height: int,
    window_width: int,
) -> torch.Tensor:
    at_least = torch.promote_types(x.dtype, torch.float32)
    sizes = [taps.shape[1], taps.shape[1], qkv.shape[2] - 2 * taps.shape[1]]
    dims = [key_dim, key_dim, x.shape[1] // len(kernels)]

    def parts(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([part[:dim] for part, dim in zip(t.split(sizes), dims, strict=True)])

    taps_of_heads = zip(taps.split([k * k for k in kernels]), kernels, strict=True)
    out = cascaded_group_attention.plain(
        x.to(at_least),
        [parts(weight.mT).unsqueeze(-1).unsqueeze(-1) for weight in qkv],
        [parts(bias) for bias in qkv_bias],
        [t.mT[:key_dim].reshape(key_dim, 1, k, k) for t, k in taps_of_heads],
        [bias[:key_dim] for bias in tap_bias],
        attention_bias,
        scale,
        window_height,
        window_width,
    )
    return project(out.relu(), unpack_projection(proj, len(proj_bias)), proj_bias).to(x.dtype)


OPERATOR = InferenceOperator(
    "cascaded_group_attention_projected",
    plain,
    lambda x, *arguments: (x.shape[0], arguments[Packed._fields.index("proj_bias")].shape[0], *x.shape[2:]),
)
serves = OPERATOR.serves
