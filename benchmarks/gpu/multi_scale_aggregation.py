"""multi_scale_aggregation on a GPU: it is tried, and measured as a part of what it is made for alone."""

from __future__ import annotations

from typing import Any

import torch

import effattn
from benchmarks.gpu.measured import Measured, Shape, Sizes
from benchmarks.gpu.runner import STOCK, Function
from effattn.ops import OPERATORS

Tensors = list[torch.Tensor]
OPERATOR = OPERATORS["multi_scale_aggregation"]


def sizes(batch: int, heads: int, head_dim: int, height: int, width: int, kernels: tuple[int, ...] = (5,)) -> Sizes:
    return {
        **{"B": batch, "heads": heads, "head_dim": head_dim, "H": height, "W": width, "S": len(kernels), "k": kernels},
        "without": ("dw_biases", "pw_biases"),
    }


def _ours(qkv: torch.Tensor, dw: Tensors, pw: Tensors, *rest: Any) -> torch.Tensor:
    return effattn.multi_scale_aggregation(qkv, dw, pw, head_dim=rest[-1])


def _peers(sizes: Sizes) -> dict[str, Function]:
    return {STOCK: OPERATOR.plain}


def flops(sizes: Sizes) -> int:
    head_dim = sizes["head_dim"]
    of_a_pixel = 3 * sizes["heads"] * head_dim * sum(2 * (k * k + head_dim) for k in sizes["k"])
    return int(sizes["B"] * sizes["H"] * sizes["W"] * of_a_pixel)


MEASURED = Measured(
    OPERATOR,
    _ours,
    _peers,
    flops,
    tiny=(Shape("tiny", sizes(1, 1, 8, 5, 6)),),
    smoke={
        "": [
            Shape("one scale", sizes(2, 2, 16, 9, 21)),
            Shape("two scales", sizes(1, 1, 32, 33, 40, (3, 5))),
        ]
    },
    suite="gpu-aggregation",
    title="multi-scale aggregation",
)
