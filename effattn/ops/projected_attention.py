"""EfficientFormer's attention with its projections, in evaluation, with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from effattn.ops import biased_attention
from effattn.ops._operator import InferenceOperator
from effattn.ops._packed import (
    OUTPUTS,
    joined,
    of_heads,
    of_whole_heads,
    pack_projection,
    padded,
    rounded,
    unpack_projection,
)
from effattn.ops._plain import depthwise, project, without_autocast

Pair = tuple[torch.Tensor, torch.Tensor]

SCHEMA = (
    "(Tensor x, Tensor? halving_taps, Tensor? halving_bias, Tensor? q, Tensor? q_bias, Tensor qkv, Tensor qkv_bias, "
    "Tensor bias, Tensor[]? talking_heads, Tensor? taps, Tensor? tap_bias, Tensor proj, Tensor proj_bias, int key_dim, "
    "int value_dim, float scale, int activation, int out_height, int out_width) -> Tensor"
)


class Packed(NamedTuple):
    """Weights in float32 as the operator takes them.

    Args:
        halving_taps: of a depthwise convolution with a stride of two, (blocks, k * k, OUTPUTS); halving_bias
            (blocks * OUTPUTS,); or None. It halves the queries' image if there is a ``q``, else all.
        q: of the queries' own image, or None: (blocks, C, OUTPUTS), q_bias (heads * rounded(key_dim),).
        qkv: (blocks, C, OUTPUTS): all heads' q (unless ``q`` has them), their k, then from a whole block on their v,
            channels of a head a multiple of CHANNELS; qkv_bias: (outputs of these,).
        bias: (heads, queries, keys).
        talking_heads: as of biased_attention, or empty.
        taps: of the values' depthwise convolution, (blocks, k * k, OUTPUTS); tap_bias (blocks * OUTPUTS,); or None.
        proj: of the last 1x1 convolution, (blocks, heads * rounded(value_dim), OUTPUTS); proj_bias (outputs,).
    """

    halving_taps: torch.Tensor | None
    halving_bias: torch.Tensor | None
    q: torch.Tensor | None
    q_bias: torch.Tensor | None
    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    bias: torch.Tensor
    talking_heads: Sequence[torch.Tensor]
    taps: torch.Tensor | None
    tap_bias: torch.Tensor | None
    proj: torch.Tensor
    proj_bias: torch.Tensor
    key_dim: int
    value_dim: int


def pack(
    q: Pair,
    k: Pair,
    v: Pair,
    bias: torch.Tensor,
    proj: Pair,
    *,
    talking_heads: Sequence[torch.Tensor] = (),
    local: Pair | None = None,
    halving: Pair | None = None,
    halves_queries_alone: bool = False,
) -> Packed:
    """Lays weights of any dtype out once for many calls.

    Args:
        q, k, v: weight (heads * channels, C) and bias (heads * channels,) of 1x1 convolutions.
        bias: (heads, queries, keys).
        proj: weight (outputs, heads * value_dim) and bias of the last 1x1 convolution.
        talking_heads: as of biased_attention.
        local: weight (heads * value_dim, 1, k, k) and bias of a depthwise convolution of v, added to the output.
        halving: weight (C, 1, k, k) and bias of a depthwise convolution with a stride of two, before all else.
        halves_queries_alone: k and v are then made from the image as it is; ``local`` has a stride of two.
    """
    own_image = halves_queries_alone
    q, k, v, proj = ((weight.float(), of.float()) for weight, of in (q, k, v, proj))
    heads = bias.shape[0]
    key_dim, value_dim = len(k[1]) // heads, len(v[1]) // heads
    keys, values = heads * rounded(key_dim), heads * rounded(value_dim)
    first = [k] if own_image else [q, k]
    before_v = rounded(len(first) * keys, OUTPUTS) - (len(first) - 1) * keys
    sizes = [*[keys] * (len(first) - 1), before_v, values]
    weight, qkv_bias = (joined([of_whole_heads(part[i], heads) for part in (*first, v)], sizes) for i in (0, 1))
    if local is not None:
        local = (of_whole_heads(local[0], heads), of_whole_heads(local[1], heads))
    return Packed(
        *_packed_depthwise(halving),
        pack_projection(of_whole_heads(q[0], heads)) if own_image else None,
        of_whole_heads(q[1], heads) if own_image else None,
        pack_projection(weight),
        qkv_bias,
        bias.float().contiguous(),
        [t.detach().float() for t in talking_heads],  # views of parameters, which torch could not swap
        *_packed_depthwise(local),
        pack_projection(of_whole_heads(proj[0].mT, heads).mT),
        proj[1],
        key_dim,
        value_dim,
    )


def _packed_depthwise(convolution: Pair | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if convolution is None:
        return None, None
    weight, bias = convolution
    return pack_projection(weight.float().flatten(1)), padded(bias.float(), 0, rounded(len(bias), OUTPUTS))


#: Activations in front of the last 1x1 convolution, by the operator's numbers.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}


def projected_attention(
    x: torch.Tensor,
    packed: Packed,
    scale: float,
    *,
    activation: str = "none",
    out_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """1x1 convolution, biased_attention, the values' depthwise convolution, upsampling, activation, 1x1 convolution.

    Args:
        x: (B, C, H, W).
        packed: the weights.
        scale: of the logits.
        activation: one of ACTIVATIONS.
        out_size: upsamples the image bilinearly; by default that of the queries.

    Returns:
        (B, outputs, *out_size)
    """
    size = out_size or (x.shape[2:] if packed.halving_taps is None else halved(x.shape[2:]))
    return OPERATOR(x, *packed, scale, ACTIVATIONS[activation], *size)


def halved(size: Sequence[int]) -> tuple[int, int]:
    """What a convolution with a stride of two makes of (H, W)."""
    return -(-size[0] // 2), -(-size[1] // 2)


def plain(
    x: torch.Tensor,
    halving_taps: torch.Tensor | None,
    halving_bias: torch.Tensor | None,
    q: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor,
    bias: torch.Tensor,
    talking_heads: Sequence[torch.Tensor],
    taps: torch.Tensor | None,
    tap_bias: torch.Tensor | None,
    proj: torch.Tensor,
    proj_bias: torch.Tensor,
    key_dim: int,
    value_dim: int,
    scale: float,
    activation: int,
    out_height: int,
    out_width: int,
) -> torch.Tensor:
    image = x.to(torch.promote_types(x.dtype, torch.float32))
    q_image = image
    if halving_taps is not None and halving_bias is not None:
        taps_of_x = unpack_projection(halving_taps, x.shape[1])
        q_image = depthwise(image, taps_of_x, halving_bias[: x.shape[1]], stride=2)
        image = q_image if q is None else image
    heads = len(bias)
    keys, values = heads * rounded(key_dim), heads * rounded(value_dim)
    before_v = rounded(2 * keys if q is None else keys, OUTPUTS)
    weights, biases = unpack_projection(qkv, before_v + values), qkv_bias
    if q is not None and q_bias is not None:
        weights, biases = torch.cat([unpack_projection(q, keys), weights]), torch.cat([q_bias, biases])
        before_v += keys
    projected = [
        project(of, of_heads(weights[first:], heads, dim), of_heads(biases[first:], heads, dim))
        for first, dim, of in ((0, key_dim, q_image), (keys, key_dim, image), (before_v, value_dim, image))
    ]
    q_heads, k, v = (t.flatten(2).reshape(x.shape[0], heads, t.shape[1] // heads, -1).mT for t in projected)
    size = projected[0].shape[2:]
    out = biased_attention.plain(q_heads, k, v, bias, talking_heads, scale).mT.reshape(
        x.shape[0], heads * value_dim, *size
    )
    with without_autocast(x.device):
        if taps is not None and tap_bias is not None:
            taps = of_heads(unpack_projection(taps, values), heads, value_dim)
            local_bias = of_heads(tap_bias, heads, value_dim)
            out = out + depthwise(projected[2], taps, local_bias, stride=1 if q is None else 2)
        if size != (out_height, out_width):
            out = functional.interpolate(out, size=(out_height, out_width), mode="bilinear")
        out = (out, out.relu(), functional.gelu(out))[activation]
    matrix = of_heads(unpack_projection(proj, len(proj_bias)).mT, heads, value_dim).mT
    return project(out, matrix, proj_bias).to(x.dtype)


OPERATOR = InferenceOperator(
    "projected_attention",
    plain,
    lambda x, *arguments: (x.shape[0], arguments[Packed._fields.index("proj_bias")].shape[0], *arguments[-2:]),
)
serves = OPERATOR.serves
