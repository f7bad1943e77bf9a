"""multi_scale_aggregation and multi_scale_linear_attention, launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effattn._triton.layout import with_mergeable_rows
from effattn.backends._memory import empty_image_in_order_of
from effattn.backends.triton._launch import Launchers, on_device_of, target

Tensors = Sequence[torch.Tensor]


def aggregation(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int
) -> torch.Tensor:
    from effattn._triton import multi_scale

    out = empty_image_in_order_of(qkv, (qkv.shape[0], (1 + len(dw)) * qkv.shape[1], *qkv.shape[2:]))
    if out.numel() > 0:
        with on_device_of(qkv):
            weights = (dw, pw, dw_biases, pw_biases)
            multi_scale.aggregate(with_mergeable_rows(qkv), weights, out, head_dim, target(qkv))
    return out


def aggregation_backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    dw: Tensors,
    pw: Tensors,
    dw_biases: Tensors,
    pw_biases: Tensors,
    head_dim: int,
) -> tuple[torch.Tensor | list[torch.Tensor], ...]:
    from effattn._triton import multi_scale

    weights = (dw, pw, dw_biases, pw_biases)
    grad_qkv, grad_weights = _empty_gradients(qkv, weights)
    if qkv.numel() > 0:
        with on_device_of(qkv):
            multi_scale.aggregate_backward(
                with_mergeable_rows(grad_out), with_mergeable_rows(qkv), weights, grad_qkv, grad_weights, head_dim,
                target(qkv),
            )  # fmt: skip
    return grad_qkv, *grad_weights


def attention(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int, eps: float
) -> torch.Tensor:
    return attention_forward(qkv, dw, pw, dw_biases, pw_biases, head_dim, eps)[0]


def attention_forward(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from effattn._triton import multi_scale

    heads = (1 + len(dw)) * (qkv.shape[1] // (3 * head_dim))
    out = empty_image_in_order_of(qkv, (qkv.shape[0], heads * head_dim, *qkv.shape[2:]))
    sums = qkv.new_empty((qkv.shape[0], heads, head_dim + 1, head_dim), dtype=torch.float32)
    if out.numel() > 0:
        with on_device_of(qkv):
            weights = (dw, pw, dw_biases, pw_biases)
            multi_scale.attend(with_mergeable_rows(qkv), weights, sums, out, head_dim, eps, target(qkv))
    else:
        sums.zero_()
    return out, sums


def attention_backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    dw: Tensors,
    pw: Tensors,
    dw_biases: Tensors,
    pw_biases: Tensors,
    sums: torch.Tensor,
    head_dim: int,
    eps: float,
) -> tuple[torch.Tensor | list[torch.Tensor], ...]:
    from effattn._triton import multi_scale

    weights = (dw, pw, dw_biases, pw_biases)
    grad_qkv, grad_weights = _empty_gradients(qkv, weights)
    if qkv.numel() > 0:
        with on_device_of(qkv):
            multi_scale.attend_backward(
                with_mergeable_rows(grad_out), with_mergeable_rows(qkv), weights, sums.contiguous(),
                grad_qkv, grad_weights, head_dim, eps, target(qkv),
            )  # fmt: skip
    return grad_qkv, *grad_weights


def _empty_gradients(qkv: torch.Tensor, weights: Sequence[Tensors]) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """To be filled; those of the weights 0 where there is no image."""
    new = torch.Tensor.new_zeros if qkv.numel() == 0 else torch.Tensor.new_empty
    return empty_image_in_order_of(qkv, qkv.shape), [[new(t, t.shape) for t in ts] for ts in weights]


LAUNCHERS = {
    "multi_scale_aggregation": Launchers(aggregation, aggregation, aggregation_backward),
    "multi_scale_linear_attention": Launchers(attention, attention_forward, attention_backward),
}
