"""relu_linear_attention, launched."""

from __future__ import annotations

import math

import torch

from effattn.backends._memory import empty_in_order_of
from effattn.backends.triton._launch import Launchers, addressable, copied, on_device_of, target


def inference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    return forward(q, k, v, eps)[0]


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    from effattn._triton import relu_linear_attention

    out = empty_in_order_of(q, (*q.shape[:-1], v.shape[-1]))
    sums = q.new_empty((*q.shape[:-2], v.shape[-1] + 1, q.shape[-1]), dtype=torch.float32)
    if 0 in (q.shape[-1], v.shape[-1]):  # 0 / (0 + eps)
        out.fill_(0.0 if eps > 0 else math.nan)
        sums.zero_()
    elif sums.numel() > 0:
        q, k, v, into = addressable(q, k, v, out)
        with on_device_of(q):
            relu_linear_attention.forward(q, k, v, sums, into, eps, target(q))
        copied(out, into)
    return out, sums


def backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    from effattn._triton import relu_linear_attention

    grads = tuple(empty_in_order_of(t, t.shape) for t in (q, k, v))
    if 0 in (q.shape[-1], v.shape[-1]):
        for grad in grads:
            grad.zero_()
    elif sums.numel() > 0:
        grad_out, q, k, v, *into = addressable(grad_out, q, k, v, *grads)
        with on_device_of(q):
            relu_linear_attention.backward(
                grad_out, q, k, v, sums.contiguous(), (into[0], into[1], into[2]), eps, target(q)
            )
        for grad, t in zip(grads, into, strict=True):
            copied(grad, t)
    return grads


LAUNCHERS = {
    "relu_linear_attention": Launchers(inference, forward, backward),
}
