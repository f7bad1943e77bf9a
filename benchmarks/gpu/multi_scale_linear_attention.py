"""multi_scale_linear_attention on a GPU."""

from __future__ import annotations

from typing import Any

import torch

import effattn
from benchmarks.gpu import multi_scale_aggregation
from benchmarks.gpu.measured import BATCHES, Measured, Shape, Sizes
from benchmarks.gpu.runner import STOCK, Function
from effattn.ops import OPERATORS
from effattn.testing import official_multi_scale_attention

Tensors = list[torch.Tensor]


def _sizes(*sizes: Any) -> Sizes:
    return {**multi_scale_aggregation.sizes(*sizes), "eps": 1e-15}


def _ours(qkv: torch.Tensor, dw: Tensors, pw: Tensors, *rest: Any) -> torch.Tensor:
    *_, head_dim, eps = rest
    return effattn.multi_scale_linear_attention(qkv, dw, pw, head_dim=head_dim, eps=eps)


def _official(qkv: torch.Tensor, dw: Tensors, pw: Tensors, *rest: Any) -> torch.Tensor:
    """The authors' code has no biases either; convolutions are in the type of the image, sums in float32."""
    return official_multi_scale_attention(qkv, dw, pw, *rest[2:], upcast=True)


def _peers(sizes: Sizes) -> dict[str, Function]:
    return {STOCK: _official}


def _flops(sizes: Sizes) -> int:
    of_a_pixel = (1 + sizes["S"]) * sizes["heads"] * sizes["head_dim"] * (sizes["head_dim"] + 1) * 4
    return multi_scale_aggregation.flops(sizes) + int(sizes["B"] * sizes["H"] * sizes["W"] * of_a_pixel)


SUITE = "gpu-multi-scale"
LARGE, SAM = "b1 stage 3 @1024x2048", "l2 SAM stage 4 @1024"

MEASURED = Measured(
    OPERATORS["multi_scale_linear_attention"],
    _ours,
    _peers,
    _flops,
    tiny=(Shape("tiny", _sizes(1, 1, 8, 5, 6)),),
    smoke={
        "": [
            Shape("one scale", _sizes(2, 2, 16, 9, 21)),
            Shape("two scales", _sizes(1, 1, 32, 33, 40, (3, 5))),
            # Of a block: more than a GPU's multiprocessors take at once.
            Shape("several tiles", _sizes(8, 8, 16, 33, 40)),
        ]
    },
    suite=SUITE,
    title="multi-scale attention",
    shapes=(
        Shape(LARGE, _sizes(1, 8, 16, 64, 128)),
        Shape(SAM, _sizes(1, 16, 32, 32, 32)),
        *(Shape(f"b1 stage 3 @224, batch {batch}", _sizes(batch, 8, 16, 14, 14)) for batch in BATCHES),
        Shape("b3 stage 3 @512, batch 4", _sizes(4, 8, 32, 32, 32)),
    ),
    main=(f"{SUITE}: {LARGE}, bfloat16", f"{SUITE}: {SAM}, bfloat16"),
    profiled=(f"{SUITE}: {LARGE}, bfloat16",),
    on_a_gpu={"": Shape("two images", _sizes(2, 8, 16, 32, 48))},
)
