"""multi_scale_aggregation and multi_scale_linear_attention, launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effattn.backends.triton._launch import Launchers

Images = Sequence[torch.Tensor]


def aggregation(results: Images, qkv: torch.Tensor, *rest: Any) -> None:
    from effattn._triton import multi_scale

    *weights, head_dim, target = rest
    multi_scale.aggregate(qkv, weights, *results, head_dim, target)


def aggregation_backward(grads: Sequence[Any], grad_out: torch.Tensor, qkv: torch.Tensor, *rest: Any) -> None:
    from effattn._triton import multi_scale

    *weights, head_dim, target = rest
    multi_scale.aggregate_backward(grad_out, qkv, weights, grads[0], grads[1:], head_dim, target)


def attention(results: Images, qkv: torch.Tensor, *rest: Any) -> None:
    from effattn._triton import multi_scale

    *weights, head_dim, eps, target = rest
    out, kv_state = results
    multi_scale.attend(qkv, weights, kv_state, out, head_dim, eps, target)


def attention_backward(grads: Sequence[Any], grad_out: torch.Tensor, qkv: torch.Tensor, *rest: Any) -> None:
    from effattn._triton import multi_scale

    *weights, kv_state, head_dim, eps, target = rest
    multi_scale.attend_backward(grad_out, qkv, weights, kv_state, grads[0], grads[1:], head_dim, eps, target)


LAUNCHERS = {
    "multi_scale_aggregation": Launchers(aggregation, aggregation_backward),
    "multi_scale_linear_attention": Launchers(attention, attention_backward),
}
