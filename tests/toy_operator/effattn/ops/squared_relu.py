"""squared_relu: the activation of Primer (arXiv 2109.08668), times a weight a channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effattn.ops._operator import Operator
from effattn.ops._plain import without_autocast

SIGNATURE = """
    x      image (B, C, H, W)
    weight weight (C)
    scale  number
    ->
    out (B, C, H, W)
"""


def plain(x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    with without_autocast(x.device):
        at_least = torch.promote_types(x.dtype, torch.float32)
        factor = scale * weight.to(at_least).reshape(-1, 1, 1)
        return (factor * x.to(at_least).relu().square()).to(x.dtype)


def longest_sum(sizes: Mapping[str, Any]) -> int:
    """The gradient of a weight."""
    return int(sizes["B"] * sizes["H"] * sizes["W"])


CASES = (
    {"B": 2, "C": 5, "H": 3, "W": 4, "scale": 0.5},
    {"B": 1, "C": 33, "H": 7, "W": 11, "scale": -2.0},
)
OPERATOR = Operator("squared_relu", SIGNATURE, plain, cases=CASES, longest_sum=longest_sum)
