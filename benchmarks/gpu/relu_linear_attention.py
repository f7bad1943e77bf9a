"""relu_linear_attention on a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

import effattn
from benchmarks import linear_attention as rla
from benchmarks.gpu.measured import BATCHES, Measured, Shape, Sizes
from benchmarks.gpu.runner import Function
from effattn import testing
from effattn.ops import OPERATORS


def _make(sizes: Sizes, dtype: torch.dtype, order: str) -> list[Any]:
    """Channel-major views of one tensor, as convolutions leave it; or as diffusers has it, heads of (batch, tokens,
    channels)."""
    (batch, heads), tokens, channels = sizes["..."], sizes["N"], sizes["D"]
    if order == "second":
        qkv = testing.make_tensor(batch, heads, 3 * channels, tokens, dtype=dtype)
        return [*rla.split_heads(qkv), sizes["eps"]]
    images = (testing.make_tensor(batch, tokens, heads * channels, dtype=dtype, seed=seed) for seed in range(3))
    return [*(t.unflatten(-1, (heads, channels)).transpose(1, 2) for t in images), sizes["eps"]]


def _sizes(batch: int, heads: int, channels: int, tokens: int) -> Sizes:
    return {"...": (batch, heads), "N": tokens, "M": tokens, "D": channels, "Dv": channels, "eps": rla.EPS}


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    return effattn.relu_linear_attention(q, k, v, eps=eps)


def _softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def _peers(sizes: Sizes) -> dict[str, Function]:
    return {"official": rla.official, "timm": rla.timm}


def _flops(sizes: Sizes) -> int:
    return int(4 * math.prod(sizes["..."]) * sizes["N"] * sizes["D"] * (sizes["D"] + 1))


STAGE_3, STAGE_3_LARGE = "b1 stage 3 @224", "b1 stage 3 @1024x2048"
SANA = "Sana N4096 C1152 H36, batch 16"
SUITE = "gpu-attention"

MEASURED = Measured(
    OPERATORS["relu_linear_attention"],
    _ours,
    _peers,
    _flops,
    tiny=(
        Shape("tiny", _sizes(1, 2, 8, 9), order="second"),
        Shape("tiny, tokens first", _sizes(1, 2, 8, 9)),
    ),
    smoke={
        "": [
            Shape(f"{name}, {order} order", sizes, order=order)
            for name, sizes in (("few tokens", _sizes(2, 3, 16, 77)), ("many tokens", _sizes(1, 2, 32, 3080)))
            for order in ("second", "first")
        ]
    },
    suite=SUITE,
    title="linear attention",
    shapes=(
        Shape(STAGE_3_LARGE, _sizes(1, 16, 16, 8192), order="second"),
        Shape("N 65536, 16 heads of 32", _sizes(1, 16, 32, 65536), order="second"),
        Shape(SANA, _sizes(16, 36, 32, 4096), torch.float16),
        Shape("l2 stage 4 @1024x2048", _sizes(1, 32, 32, 2048), order="second"),
        *(
            Shape(STAGE_3 + (f", batch {batch}" if batch > 1 else ""), _sizes(batch, 16, 16, 196), order="second")
            for batch in BATCHES
        ),
        Shape(STAGE_3_LARGE, _sizes(1, 16, 16, 8192), torch.float32, "second"),
    ),
    context=lambda sizes: {"softmax (SDPA)": _softmax},
    main=(
        f"{SUITE}: {STAGE_3_LARGE}, bfloat16",
        f"{SUITE}: {SANA}, float16",
        f"{SUITE}-training: {SANA}, float16",
    ),
    profiled=(f"{SUITE}: {STAGE_3_LARGE}, bfloat16", f"{SUITE}: {SANA}, float16"),
    make=_make,
    on_a_gpu={"": Shape("many tokens", _sizes(1, 16, 16, 8192), order="second")},
)
