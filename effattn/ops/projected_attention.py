"""The operator behind the inference of EfficientFormer's attention: fake kernel and call; no autograd formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from effattn.backends._memory import empty_image_in_order_of
from effattn.backends.packed import OUTPUTS, joined, of_whole_heads, pack_projection, padded, rounded
from effattn.ops._operator import InferenceOperator

Pair = tuple[torch.Tensor, torch.Tensor]
_OPERATOR = InferenceOperator("projected_attention")
serves = _OPERATOR.serves


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
    """1x1 convolution, biased_attention, the values' depthwise convolution, enlargement, activation, 1x1 convolution.

    Args:
        x: (B, C, H, W).
        packed: the weights.
        scale: of the logits.
        activation: one of ACTIVATIONS.
        out_size: enlarges the image bilinearly; by default that of the queries.

    Returns:
        (B, outputs, *out_size)
    """
    size = out_size or (x.shape[2:] if packed.halving_taps is None else halved(x.shape[2:]))
    return _OPERATOR(x, *packed, scale, ACTIVATIONS[activation], *size)


def halved(size: Sequence[int]) -> tuple[int, int]:
    """What a convolution with a stride of two makes of (H, W)."""
    return -(-size[0] // 2), -(-size[1] // 2)


def _fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    packed, (scale, activation, *out_size) = Packed(*arguments[:-4]), arguments[-4:]
    torch._check(x.dim() == 4, lambda: "x must have 4 dimensions (B, C, H, W)")
    torch._check(packed.bias.dim() == 3, lambda: "bias must have shape (heads, queries, keys)")
    torch._check(-math.inf < scale < math.inf, lambda: "scale must be finite")
    torch._check(activation in ACTIVATIONS.values(), lambda: "activation must be 0 (none), 1 (relu) or 2 (gelu)")
    torch._check(packed.key_dim > 0 and packed.value_dim > 0, lambda: "key_dim and value_dim must be positive")
    taps = packed.halving_taps
    torch._check((packed.q is None) == (packed.q_bias is None), lambda: "q and q_bias must both be given or be None")
    torch._check(packed.q is None or taps is not None, lambda: "q must be None where no halving_taps make its image")
    if taps is not None:
        blocks = rounded(x.shape[1], OUTPUTS) // OUTPUTS
        torch._check(
            taps.dim() == 3 and (taps.shape[0], taps.shape[2]) == (blocks, OUTPUTS),
            lambda: "halving_taps must have shape (blocks, k * k, OUTPUTS)",
        )
    heads, keys = packed.bias.shape[0], packed.bias.shape[0] * rounded(packed.key_dim)
    values = heads * rounded(packed.value_dim)
    query_size = tuple(x.shape[2:]) if taps is None else halved(x.shape[2:])
    size = query_size if packed.q is None else x.shape[2:]
    before_v = rounded(2 * keys if packed.q is None else keys, OUTPUTS)
    torch._check(
        packed.bias.shape[1:] == (query_size[0] * query_size[1], size[0] * size[1]),
        lambda: "bias must have shape (heads, queries, keys)",
    )
    torch._check(
        packed.qkv.shape == (rounded(before_v + values, OUTPUTS) // OUTPUTS, x.shape[1], OUTPUTS),
        lambda: "qkv must have shape (blocks, C, OUTPUTS)",
    )
    torch._check(packed.qkv_bias.shape == (before_v + values,), lambda: "qkv_bias must have a number for each output")
    torch._check(len(packed.talking_heads) in (0, 4), lambda: "talking_heads must have no tensors or 4")
    outputs = packed.proj_bias.shape[0]
    torch._check(
        packed.proj.shape == (rounded(outputs, OUTPUTS) // OUTPUTS, values, OUTPUTS),
        lambda: "proj must have shape (blocks, heads * rounded(value_dim), OUTPUTS)",
    )
    return empty_image_in_order_of(x, (x.shape[0], outputs, *out_size))


_OPERATOR.register(_fake)
