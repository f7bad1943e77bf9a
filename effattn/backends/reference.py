"""Plain PyTorch, straight from the equations: the specification, and the way on every other device.

Everything is made of differentiable torch operations, so higher derivatives, forward mode and
``torch.func`` work through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional

from effattn.backends._base import Backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leaves dtypes to the code inside; the meta device knows no autocast and refuses to be asked."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def relu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """EfficientViT (arXiv 2205.14756) eq. 2-4, in float32 at least, whatever autocast says."""
    with without_autocast(q.device):
        at_least = torch.promote_types(q.dtype, torch.float32)
        relu_q, relu_k = q.to(at_least).relu(), k.to(at_least).relu()
        numerator = relu_q @ (relu_k.mT @ v.to(at_least))
        denominator = relu_q @ relu_k.sum(-2).unsqueeze(-1)
        return (numerator / (denominator + eps)).to(q.dtype)


def multi_scale_aggregation(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor],
    pw_biases: Sequence[torch.Tensor],
    head_dim: int,
) -> torch.Tensor:
    """EfficientViT (arXiv 2205.14756), section 3.1: k x k depthwise, then 1x1 in groups of head_dim channels."""
    at_least = torch.promote_types(qkv.dtype, torch.float32)
    with without_autocast(qkv.device):
        x, channels = qkv.to(at_least), qkv.shape[1]
        scales = [x]
        for i, (dw, pw) in enumerate(zip(dw_weights, pw_weights, strict=True)):
            dw_bias, pw_bias = (biases[i].to(at_least) if biases else None for biases in (dw_biases, pw_biases))
            if qkv.numel() == 0:  # convolutions take no empty images
                scales.append(x * 1)
                continue
            mixed = functional.conv2d(x, dw.to(at_least), dw_bias, padding=dw.shape[-1] // 2, groups=channels)
            scales.append(functional.conv2d(mixed, pw.to(at_least), pw_bias, groups=channels // head_dim))
        return torch.cat(scales, dim=1).to(qkv.dtype)


def multi_scale_linear_attention(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor],
    pw_biases: Sequence[torch.Tensor],
    head_dim: int,
    eps: float,
) -> torch.Tensor:
    """ReLU linear attention in every head of :func:`multi_scale_aggregation`."""
    at_least = torch.promote_types(qkv.dtype, torch.float32)
    scales = multi_scale_aggregation(qkv.to(at_least), dw_weights, pw_weights, dw_biases, pw_biases, head_dim)
    batch, channels, height, width = scales.shape
    heads = scales.reshape(batch, channels // (3 * head_dim), 3 * head_dim, height * width).mT
    q, k, v = heads.chunk(3, dim=-1)
    out = relu_linear_attention(q, k, v, eps)
    return out.mT.reshape(batch, channels // 3, height, width).to(qkv.dtype)


def lite_mla(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor],
    pw_biases: Sequence[torch.Tensor],
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    head_dim: int,
    eps: float,
) -> torch.Tensor:
    """EfficientViT's module around :func:`multi_scale_linear_attention`, in evaluation with BatchNorm folded in."""
    at_least = torch.promote_types(x.dtype, torch.float32)

    def project(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        linear = functional.linear(
            image.movedim(1, -1), weight.to(at_least), None if bias is None else bias.to(at_least)
        )
        return linear.movedim(-1, 1)

    with without_autocast(x.device):
        qkv = project(x.to(at_least), qkv_weight, qkv_bias)
        out = multi_scale_linear_attention(qkv, dw_weights, pw_weights, dw_biases, pw_biases, head_dim, eps)
        return project(out, proj_weight, proj_bias).to(x.dtype)


def _unavailable() -> str | None:
    return None


def _reasons(op: str, device: str, dtype: torch.dtype) -> list[str]:
    reasons = []
    if op not in FUNCTIONS:
        reasons.append(f"has no {op}")
    if dtype not in DTYPES:
        reasons.append(f"takes float64, float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}")
    return reasons


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu_linear_attention": relu_linear_attention,
    "multi_scale_aggregation": multi_scale_aggregation,
    "multi_scale_linear_attention": multi_scale_linear_attention,
    "lite_mla": lite_mla,
}

BACKEND = Backend("reference", _unavailable, _reasons, FUNCTIONS)
