"""squared_relu on a GPU."""

from __future__ import annotations

from typing import Any

import torch

import effattn
from benchmarks.gpu.measured import BATCHES, Measured, Shape, Sizes
from benchmarks.gpu.runner import STOCK
from effattn.ops import OPERATORS


def _sizes(batch: int, channels: int, height: int, width: int) -> Sizes:
    return {"B": batch, "C": channels, "H": height, "W": width, "scale": 1.0}


def _ours(*arguments: Any) -> torch.Tensor:
    x, weight, scale = arguments
    return effattn.squared_relu(x, weight, scale=scale)


def _stock(*arguments: Any) -> torch.Tensor:
    x, weight, scale = arguments
    return (scale * weight).to(x.dtype).reshape(-1, 1, 1) * x.relu().square()


def _flops(sizes: Sizes) -> int:
    return int(3 * sizes["B"] * sizes["C"] * sizes["H"] * sizes["W"])


MEASURED = Measured(
    OPERATORS["squared_relu"],
    _ours,
    lambda sizes: {STOCK: _stock},
    _flops,
    tiny=(Shape("tiny", _sizes(1, 3, 2, 5)),),
    smoke={"": [Shape("several tiles", _sizes(2, 40, 13, 17))]},
    suite="gpu-squared-relu",
    title="squared ReLU",
    shapes=tuple(Shape(f"14x14, batch {batch}", _sizes(batch, 128, 14, 14)) for batch in BATCHES),
)
