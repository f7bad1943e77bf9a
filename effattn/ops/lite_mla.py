"""The operator behind LiteMLA's inference: fake kernel and call. It has no autograd formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from effattn.backends._memory import empty_image_in_order_of
from effattn.ops._operator import InferenceOperator
from effattn.ops.multi_scale import multi_scale_linear_attention

Tensors = Sequence[torch.Tensor]
_OPERATOR = InferenceOperator("lite_mla")
serves = _OPERATOR.serves


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
    return _OPERATOR(x, *weights, head_dim, eps)


def _fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    weights, (head_dim, eps) = Weights(*arguments[:-2]), arguments[-2:]
    matrices = weights.qkv_weight, weights.proj_weight
    torch._check(x.dim() == 4, lambda: "x must have 4 dimensions (B, C, H, W)")
    for weight, bias in zip(matrices, (weights.qkv_bias, weights.proj_bias), strict=True):
        torch._check(weight.dim() == 2, lambda: "qkv_weight and proj_weight must have 2 dimensions (outputs, inputs)")
        torch._check(bias is None or bias.shape == weight.shape[:1], lambda: "biases must have shape (outputs,)")
    (channels, inputs), (out_channels, attended_channels) = (weight.shape for weight in matrices)
    torch._check(inputs == x.shape[1], lambda: "qkv_weight must have shape (outputs, C)")
    qkv = x.new_empty((x.shape[0], channels, *x.shape[2:]))
    scales = weights.dw, weights.pw, weights.dw_biases, weights.pw_biases
    multi_scale_linear_attention.check(qkv, *scales, head_dim, eps)
    attended = multi_scale_linear_attention.shape(qkv, *scales, head_dim, eps)
    torch._check(
        attended_channels == attended[1],
        lambda: "proj_weight must have shape (C_out, (1 + S) * heads * head_dim)",
    )
    return empty_image_in_order_of(x, (x.shape[0], out_channels, *x.shape[2:]))


_OPERATOR.register(_fake)
