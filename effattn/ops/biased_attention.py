"""biased_attention as torch sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from effattn.ops._operator import Operator

Tensors = Sequence[torch.Tensor]


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, talking_heads: Tensors, scale: float
) -> None:
    """Raises RuntimeError where the compiled operators would; effattn.functional says it in better words."""
    for t in (q, k, v):
        torch._check(t.dim() == 4, lambda: "q, k and v must have 4 dimensions (B, heads, tokens, channels)")
        torch._check(t.dtype == q.dtype, lambda: "q, k and v must have one dtype")
        torch._check(t.device == q.device, lambda: "q, k and v must be on one device")
        torch._check(t.shape[:2] == q.shape[:2], lambda: "q, k and v must have the same batch and heads")
    torch._check(k.shape[3] == q.shape[3], lambda: "k must have the head_dim of q")
    torch._check(v.shape[2] == k.shape[2], lambda: "v must have as many tokens as k")
    heads = q.shape[1]
    torch._check(bias.shape == (heads, q.shape[2], k.shape[2]), lambda: "bias must have shape (heads, N, M)")
    torch._check(len(talking_heads) in (0, 4), lambda: "talking_heads must have no tensors or 4")
    for i, t in enumerate(talking_heads):
        torch._check(
            t.shape == ((heads,) if i % 2 else (heads, heads)),
            lambda: "talking_heads must have shapes (heads, heads) and (heads,), twice",
        )
    for t in (bias, *talking_heads):
        torch._check(t.device == q.device, lambda: "bias and talking_heads must be on q's device")
        torch._check(t.dtype in (q.dtype, torch.float32), lambda: "bias and talking_heads must be float32 or as q")
    torch._check(-math.inf < scale < math.inf, lambda: "scale must be finite")


def _shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[int, ...]:
    return *q.shape[:3], v.shape[3]


def _sizes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, talking_heads: Tensors, scale: float
) -> tuple[int, ...]:
    return q.shape[3], v.shape[3], q.shape[1] if talking_heads else 0


biased_attention = Operator("biased_attention", 3, 5, _check, _shape, _sizes)
biased_attention.register()
