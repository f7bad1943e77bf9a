"""relu_linear_attention, launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from effattn.backends.triton._launch import Launchers, clear


def forward(
    results: Sequence[torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, target: Any
) -> None:
    from effattn._triton import linear_attention

    out, kv_state = results
    if q.shape[-1] == 0:  # 0 / (0 + eps)
        out.fill_(0.0 if eps > 0 else math.nan)
    else:
        linear_attention.forward(q, k, v, kv_state, out, eps, target)


def backward(grads: Sequence[torch.Tensor], *arguments: Any) -> None:
    from effattn._triton import linear_attention

    grad_out, q, k, v, kv_state, eps, target = arguments
    if q.shape[-1] == 0:
        clear(grads)
    else:
        linear_attention.backward(grad_out, q, k, v, kv_state, grads, eps, target)


LAUNCHERS = {
    "relu_linear_attention": Launchers(forward, backward),
}
