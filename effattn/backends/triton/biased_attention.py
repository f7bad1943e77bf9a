"""biased_attention, launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effattn._triton.configs import MAX_TALKING_HEADS
from effattn.backends._memory import empty_in_order_of
from effattn.backends.triton._launch import Launchers, on_device_of, target

Tensors = Sequence[torch.Tensor]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, talking_heads: Tensors, scale: float
) -> torch.Tensor:
    from effattn._triton import biased_attention
    from effattn._triton import biased_attention_talking_heads as talking

    out = empty_in_order_of(q, (*q.shape[:3], v.shape[3]))
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_()
    with on_device_of(q):
        bias, mixtures = bias.contiguous(), [t.contiguous() for t in talking_heads]
        if mixtures:
            talking.forward(q, k, v, bias, mixtures, out, scale, target(q))
        else:
            biased_attention.forward(q, k, v, bias, out, scale, target(q))
    return out


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    talking_heads: Tensors,
    scale: float,
) -> tuple[torch.Tensor | list[torch.Tensor], ...]:
    from effattn._triton import biased_attention
    from effattn._triton import biased_attention_talking_heads as talking

    grads = *(empty_in_order_of(t, t.shape) for t in (q, k, v)), bias.new_empty(bias.shape)
    grad_talking = [t.new_empty(t.shape) for t in talking_heads]
    if grad_out.numel() == 0 or k.shape[2] == 0:
        for grad in (*grads, *grad_talking):
            grad.zero_()
        return *grads, grad_talking
    with on_device_of(q):
        bias, mixtures = bias.contiguous(), [t.contiguous() for t in talking_heads]
        if mixtures:
            talking.backward(grad_out, q, k, v, bias, mixtures, grads, grad_talking, scale, target(q))
        else:
            biased_attention.backward(grad_out, q, k, v, bias, grads, scale, target(q))
    return *grads, grad_talking


LIMITS = {"talking_heads": MAX_TALKING_HEADS}
LAUNCHERS = {
    "biased_attention": Launchers(forward, forward, backward),
}
