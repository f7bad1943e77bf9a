"""relu_linear_attention: EfficientViT (arXiv 2205.14756), eq. 2-4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effattn.ops._operator import Operator
from effattn.ops._plain import without_autocast

SIGNATURE = """
    q   tensor (..., N, D)
    k   tensor (..., M, D)
    v   tensor (..., M, Dv)
    eps number >= 0
    ->
    out      (..., N, Dv)
    kv_state (..., Dv + 1, D)
"""


LIMIT_NAMES = ("channels", "channels", "dimensions")


def limited_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> tuple[int, ...]:
    return q.shape[-1], v.shape[-1], q.dim()


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    with without_autocast(q.device):
        at_least = torch.promote_types(q.dtype, torch.float32)
        relu_q, relu_k = q.to(at_least).relu(), k.to(at_least).relu()
        numerator = relu_q @ (relu_k.transpose(-2, -1) @ v.to(at_least))
        denominator = relu_q @ relu_k.sum(-2).unsqueeze(-1)
        # An exporter for ONNX drops the addition of a scalar below 1e-8, and 0 / 0 would be left of it.
        added = denominator.new_full((1,), eps) if torch.onnx.is_in_onnx_export() else eps
        return (numerator / (denominator + added)).to(q.dtype)


def plain_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients as plain operations, which have derivatives of every order: cheaper than autograd's of `plain`."""
    with without_autocast(q.device):
        at_least = torch.promote_types(q.dtype, torch.float32)
        grad = grad_out.to(at_least)
        a, b, c = q.to(at_least).relu(), k.to(at_least).relu(), v.to(at_least)
        kv, k_sum = b.mT @ c, b.sum(-2, keepdim=True)
        denominator = (a * k_sum).sum(-1, keepdim=True) + eps
        grad_numerator = grad / denominator
        grad_denominator = -(grad_numerator * ((a @ kv) / denominator)).sum(-1, keepdim=True)
        grad_kv = a.mT @ grad_numerator
        grad_a = grad_numerator @ kv.mT + grad_denominator * k_sum
        grad_b = c @ grad_kv.mT + (a * grad_denominator).sum(-2, keepdim=True)
        return (
            torch.where(a <= 0, 0.0, grad_a).to(q.dtype),
            torch.where(b <= 0, 0.0, grad_b).to(k.dtype),
            (b @ grad_kv).to(v.dtype),
        )


def longest_sum(sizes: Mapping[str, Any]) -> int:
    return max(sizes["N"], sizes["M"], sizes["D"], sizes["Dv"])


CASES = (
    {"...": (2,), "N": 6, "M": 7, "D": 4, "Dv": 5, "eps": 1e-15},
    {"...": (1, 3), "N": 49, "M": 49, "D": 16, "Dv": 16, "eps": 1e-5},
    {"...": (), "N": 1, "M": 300, "D": 33, "Dv": 1, "eps": 1e-15},
)
OPERATOR = Operator(
    "relu_linear_attention",
    SIGNATURE,
    plain,
    limited_sizes,
    limits=LIMIT_NAMES,
    cases=CASES,
    longest_sum=longest_sum,
    plain_backward=plain_backward,
)
