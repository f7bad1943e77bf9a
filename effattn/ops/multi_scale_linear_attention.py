"""multi_scale_linear_attention: relu_linear_attention in every head of multi_scale_aggregation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effattn._tracing import static_shape
from effattn.ops import multi_scale_aggregation, relu_linear_attention
from effattn.ops._operator import Operator

Tensors = Sequence[torch.Tensor]

SIGNATURE = """
    qkv        image (B, 3 * heads * head_dim, H, W)
    dw_weights weights[S]  (3 * heads * head_dim, 1, odd k, k)
    pw_weights weights[S]  (3 * heads * head_dim, head_dim, 1, 1)
    dw_biases  weights[S]? (3 * heads * head_dim)
    pw_biases  weights[S]? (3 * heads * head_dim)
    head_dim   integer >= 1
    eps        number >= 0
    ->
    out      (B, (1 + S) * heads * head_dim, H, W)
    kv_state (B, (1 + S) * heads, head_dim + 1, head_dim)
"""


def plain(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor],
    pw_biases: Sequence[torch.Tensor],
    head_dim: int,
    eps: float,
) -> torch.Tensor:
    at_least = torch.promote_types(qkv.dtype, torch.float32)
    scales = multi_scale_aggregation.plain(qkv.to(at_least), dw_weights, pw_weights, dw_biases, pw_biases, head_dim)
    (batch, _, height, width), channels = scales.shape, static_shape(scales)[1]
    heads = scales.reshape(batch, channels // (3 * head_dim), 3 * head_dim, height * width).transpose(-2, -1)
    q, k, v = heads.chunk(3, dim=-1)
    out = relu_linear_attention.plain(q, k, v, eps)
    return out.transpose(-2, -1).reshape(batch, channels // 3, height, width).to(qkv.dtype)


CASES = tuple(case | {"eps": 1e-15} for case in multi_scale_aggregation.CASES)
OPERATOR = Operator(
    "multi_scale_linear_attention",
    SIGNATURE,
    plain,
    multi_scale_aggregation.limited_sizes,
    limits=multi_scale_aggregation.LIMIT_NAMES,
    cases=CASES,
    longest_sum=multi_scale_aggregation.longest_sum,
)
