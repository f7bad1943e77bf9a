"""Plain PyTorch, straight from the equations: the specification, and the way on every other device.

Everything is made of differentiable torch operations, so higher derivatives, forward mode and
``torch.func`` work through it.
"""

from __future__ import annotations

import torch

from effattn.backends._base import Backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def relu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """EfficientViT (arXiv 2205.14756) eq. 2-4, in float32 at least, whatever autocast says."""
    with torch.autocast(q.device.type, enabled=False):
        at_least = torch.promote_types(q.dtype, torch.float32)
        relu_q, relu_k = q.to(at_least).relu(), k.to(at_least).relu()
        numerator = relu_q @ (relu_k.mT @ v.to(at_least))
        denominator = relu_q @ relu_k.sum(-2).unsqueeze(-1)
        return (numerator / (denominator + eps)).to(q.dtype)


def _unavailable() -> str | None:
    return None


def _reasons(op: str, device: str, dtype: torch.dtype) -> list[str]:
    reasons = []
    if op not in _FUNCTIONS:
        reasons.append(f"has no {op}")
    if dtype not in DTYPES:
        reasons.append(f"takes float64, float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}")
    return reasons


_FUNCTIONS = {"relu_linear_attention": relu_linear_attention}

BACKEND = Backend("reference", _unavailable, _reasons, _FUNCTIONS)
