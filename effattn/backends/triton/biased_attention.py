"""biased_attention, launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effattn._triton.configs import MAX_TALKING_HEADS
from effattn.backends.triton._launch import Launchers, clear

Tensors = Sequence[torch.Tensor]


def forward(results: Tensors, *arguments: Any) -> None:
    from effattn._triton import biased_attention
    from effattn._triton import biased_attention_talking_heads as talking

    q, k, v, bias, mixtures, scale, target = arguments
    if k.shape[2] == 0:
        clear(results)
    elif mixtures:
        talking.forward(q, k, v, bias, mixtures, *results, scale, target)
    else:
        biased_attention.forward(q, k, v, bias, *results, scale, target)


def backward(grads: Sequence[Any], *arguments: Any) -> None:
    from effattn._triton import biased_attention
    from effattn._triton import biased_attention_talking_heads as talking

    grad_out, q, k, v, bias, mixtures, scale, target = arguments
    *of_tensors, of_mixtures = grads
    if k.shape[2] == 0:
        clear(grads)
    elif mixtures:
        talking.backward(grad_out, q, k, v, bias, mixtures, of_tensors, of_mixtures, scale, target)
    else:
        biased_attention.backward(grad_out, q, k, v, bias, of_tensors, scale, target)


LIMITS = {"talking_heads": MAX_TALKING_HEADS}
LAUNCHERS = {
    "biased_attention": Launchers(forward, backward),
}
