"""multi_scale_aggregation: EfficientViT (arXiv 2205.14756), section 3.1: k x k depthwise, 1x1 in groups of head_dim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from effattn._tracing import static_shape
from effattn.ops._operator import Operator
from effattn.ops._plain import without_autocast

Tensors = Sequence[torch.Tensor]

SIGNATURE = """
    qkv        image (B, 3 * heads * head_dim, H, W)
    dw_weights weights[S]  (3 * heads * head_dim, 1, odd k, k)
    pw_weights weights[S]  (3 * heads * head_dim, head_dim, 1, 1)
    dw_biases  weights[S]? (3 * heads * head_dim)
    pw_biases  weights[S]? (3 * heads * head_dim)
    head_dim   integer >= 1
    ->
    out (B, (1 + S) * 3 * heads * head_dim, H, W)
"""


LIMIT_NAMES = ("channels", "kernel", "scales")


def limited_sizes(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int, *_: float
) -> tuple[int, ...]:
    return head_dim, max([0, *(weight.shape[-1] for weight in dw)]), len(dw)


def plain(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor],
    pw_biases: Sequence[torch.Tensor],
    head_dim: int,
) -> torch.Tensor:
    at_least = torch.promote_types(qkv.dtype, torch.float32)
    with without_autocast(qkv.device):
        x, channels = qkv.to(at_least), static_shape(qkv)[1]
        scales = [x]
        for i, (dw, pw) in enumerate(zip(dw_weights, pw_weights, strict=True)):
            dw_bias, pw_bias = (biases[i].to(at_least) if biases else None for biases in (dw_biases, pw_biases))
            if math.prod(static_shape(qkv)) == 0:  # convolutions take no empty images
                scales.append(x * 1)
                continue
            padding = static_shape(dw)[-1] // 2
            mixed = functional.conv2d(x, dw.to(at_least), dw_bias, padding=padding, groups=channels)
            scales.append(functional.conv2d(mixed, pw.to(at_least), pw_bias, groups=channels // head_dim))
        return torch.cat(scales, dim=1).to(qkv.dtype)


def longest_sum(sizes: Mapping[str, Any]) -> int:
    """The gradients of the weights; a tap's neighbours, a group's channels."""
    return max(sizes["B"] * sizes["H"] * sizes["W"], *(k * k for k in sizes["k"]), sizes["head_dim"])


CASES = (
    {"B": 2, "heads": 1, "head_dim": 4, "H": 3, "W": 4, "S": 2, "k": (1, 3)},
    {"B": 1, "heads": 3, "head_dim": 16, "H": 7, "W": 7, "S": 1, "k": (5,), "without": ("dw_biases", "pw_biases")},
    {"B": 1, "heads": 1, "head_dim": 7, "H": 1, "W": 9, "S": 0, "k": ()},
)
OPERATOR = Operator(
    "multi_scale_aggregation", SIGNATURE, plain, limited_sizes, limits=LIMIT_NAMES, cases=CASES, longest_sum=longest_sum
)
