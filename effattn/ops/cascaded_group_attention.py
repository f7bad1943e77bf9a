"""cascaded_group_attention: EfficientViT (arXiv 2305.07027), section 3.2, in windows with zeros behind the last row and
column of the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from effattn._tracing import static_shape
from effattn.ops._operator import Operator
from effattn.ops._plain import depthwise, partition, reverse_partition, without_autocast

Tensors = Sequence[torch.Tensor]

SIGNATURE = """
    x              image (B, heads * d, H, W)
    qkv_weights    weights[positive heads] (2 * key_dim + d, d, 1, 1)
    qkv_biases     weights[heads]? (2 * key_dim + d)
    q_dw_weights   weights[heads] (positive key_dim, 1, odd k, k)
    q_dw_biases    weights[heads]? (key_dim)
    attention_bias weight (heads, window_height * window_width, window_height * window_width)
    scale          number
    window_height  integer 1..32767
    window_width   integer 1..32767
    ->
    out            (B, heads * d, H, W)
"""


LIMIT_NAMES = ("channels", "channels", "kernel", "heads")


def limited_sizes(
    x: torch.Tensor, qkv: Tensors, qkv_biases: Tensors, dw: Tensors, dw_biases: Tensors, bias: torch.Tensor, *_: float
) -> tuple[int, ...]:
    return x.shape[1] // len(qkv), dw[0].shape[0], max([weight.shape[-1] for weight in dw]), len(qkv)


def plain(
    x: torch.Tensor,
    qkv_weights: Sequence[torch.Tensor],
    qkv_biases: Sequence[torch.Tensor],
    q_dw_weights: Sequence[torch.Tensor],
    q_dw_biases: Sequence[torch.Tensor],
    attention_bias: torch.Tensor,
    scale: float,
    window_height: int,
    window_width: int,
) -> torch.Tensor:

    def project(head: int, feat: torch.Tensor) -> torch.Tensor:
        bias = qkv_biases[head].to(feat.dtype) if qkv_biases else None
        return functional.conv2d(feat, qkv_weights[head].to(feat.dtype), bias)

    def convolve(head: int, q: torch.Tensor) -> torch.Tensor:
        return depthwise(q, q_dw_weights[head], q_dw_biases[head] if q_dw_biases else None)

    size = (window_height, window_width)
    return cascade(x, project, convolve, static_shape(q_dw_weights[0])[0], attention_bias, scale, size)


def cascade(
    x: torch.Tensor,
    project: Callable[[int, torch.Tensor], torch.Tensor],
    convolve: Callable[[int, torch.Tensor], torch.Tensor],
    key_dim: int,
    attention_bias: torch.Tensor,
    scale: float,
    size: tuple[int, int],
) -> torch.Tensor:
    """A head after the other, in windows; how a head makes q, k and v of its channels is the caller's."""
    at_least = torch.promote_types(x.dtype, torch.float32)
    heads = static_shape(attention_bias)[0]
    value_dim = static_shape(x)[1] // heads
    if math.prod(static_shape(x)) == 0:  # convolutions take no empty images
        return x * 1
    with without_autocast(x.device):
        outs: list[torch.Tensor] = []
        for i, group in enumerate(partition(x.to(at_least), size).chunk(heads, 1)):
            qkv = project(i, group if i == 0 else group + outs[-1])
            q, k, v = qkv.split([key_dim, key_dim, value_dim], dim=1)
            logits = scale * (convolve(i, q).flatten(2).transpose(-2, -1) @ k.flatten(2))
            logits = logits + attention_bias[i].to(at_least)
            out = v.flatten(2) @ logits.softmax(dim=-1).transpose(-2, -1)
            outs.append(out.reshape(-1, value_dim, *size))
        return reverse_partition(torch.cat(outs, dim=1), x, size).to(x.dtype)


def longest_sum(sizes: Mapping[str, Any]) -> int:
    """The gradients of the weights, over all tokens of all windows."""
    height = -(-sizes["H"] // sizes["window_height"]) * sizes["window_height"]
    width = -(-sizes["W"] // sizes["window_width"]) * sizes["window_width"]
    return max(sizes["B"] * height * width, 2 * sizes["key_dim"] + sizes["d"])


CASES = (
    {"B": 2, "heads": 2, "d": 4, "key_dim": 4, "H": 3, "W": 4, "k": (1, 3), "window_height": 2, "window_width": 4}
    | {"scale": 0.5},
    {"B": 1, "heads": 4, "d": 16, "key_dim": 16, "H": 7, "W": 7, "k": (5,) * 4, "window_height": 7, "window_width": 7}
    | {"scale": 0.25},
    {"B": 1, "heads": 1, "d": 3, "key_dim": 5, "H": 1, "W": 9, "k": (7,), "window_height": 2, "window_width": 4}
    | {"scale": 0.4, "without": ("qkv_biases", "q_dw_biases")},
)
OPERATOR = Operator(
    "cascaded_group_attention",
    SIGNATURE,
    plain,
    limited_sizes,
    limits=LIMIT_NAMES,
    cases=CASES,
    longest_sum=longest_sum,
)
