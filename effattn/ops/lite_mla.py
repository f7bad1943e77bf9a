"""LiteMLA in evaluation with BatchNorm folded in: EfficientViT's module around multi_scale_linear_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from effattn.backends import cpu
from effattn.ops import multi_scale_linear_attention
from effattn.ops._operator import InferenceOperator
from effattn.ops._plain import project

Tensors = Sequence[torch.Tensor]

SIGNATURE = """
    x           image (B, C, H, W)
    qkv_weight  weight (3 * heads * head_dim, C)
    qkv_bias    weight? (3 * heads * head_dim)
    dw_weights  weights[S] (3 * heads * head_dim, 1, odd k, k)
    pw_weights  weights[S] (3 * heads * head_dim, head_dim, 1, 1)
    dw_biases   weights[S]? (3 * heads * head_dim)
    pw_biases   weights[S]? (3 * heads * head_dim)
    proj_weight weight (C_out, (1 + S) * heads * head_dim)
    proj_bias   weight? (C_out)
    head_dim    integer >= 1
    eps         number >= 0
    ->
    out alone   (B, C_out, H, W)
"""

#: Of a module with more, the parts are called.
MAX_SCALES = cpu.LIMITS.get("scales", 0)


class Weights(NamedTuple):
    """Of the module, float32.

    Args:
        qkv_weight: (3 * heads * head_dim, C); qkv_bias of as many outputs, or None.
        dw, pw, dw_biases, pw_biases: as in multi_scale_linear_attention.
        proj_weight: (C_out, (1 + S) * heads * head_dim); proj_bias of as many outputs, or None.
    """

    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    dw: Tensors
    pw: Tensors
    dw_biases: Tensors
    pw_biases: Tensors
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor | None


def lite_mla(x: torch.Tensor, weights: Weights, head_dim: int, eps: float) -> torch.Tensor:
    """(B, C, H, W) -> (B, C_out, H, W): 1x1 convolution, multi_scale_linear_attention, 1x1 convolution."""
    return OPERATOR(x, *weights, head_dim, eps)


def plain(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor],
    pw_biases: Sequence[torch.Tensor],
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    head_dim: int,
    eps: float,
) -> torch.Tensor:
    at_least = torch.promote_types(x.dtype, torch.float32)

    qkv = project(x.to(at_least), qkv_weight, qkv_bias)
    out = multi_scale_linear_attention.plain(qkv, dw_weights, pw_weights, dw_biases, pw_biases, head_dim, eps)
    return project(out, proj_weight, proj_bias).to(x.dtype)


OPERATOR = InferenceOperator("lite_mla", plain, signature=SIGNATURE)
serves = OPERATOR.serves
