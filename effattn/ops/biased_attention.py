"""biased_attention: EfficientFormer (arXiv 2206.01191), with talking heads EfficientFormerV2 (arXiv 2212.08059)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effattn.ops._operator import Operator
from effattn.ops._plain import mix_heads, without_autocast

Tensors = Sequence[torch.Tensor]

SIGNATURE = """
    q    tensor (B, heads, N, D)
    k    tensor (B, heads, M, D)
    v    tensor (B, heads, M, Dv)
    bias weight (heads, N, M)
    talking_heads weights[4]? (heads, heads) (heads) (heads, heads) (heads)
    scale number
    ->
    out  (B, heads, N, Dv)
"""


LIMIT_NAMES = ("channels", "channels", "talking_heads")


def limited_sizes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, talking_heads: Tensors, scale: float
) -> tuple[int, ...]:
    return q.shape[3], v.shape[3], q.shape[1] if talking_heads else 0


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    talking_heads: Sequence[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    with without_autocast(q.device):
        at_least = torch.promote_types(q.dtype, torch.float32)
        logits = scale * (q.to(at_least) @ k.to(at_least).transpose(-2, -1)) + bias.to(at_least)
        weights = mix_heads(logits, talking_heads[:2]).softmax(dim=-1)
        return (mix_heads(weights, talking_heads[2:]) @ v.to(at_least)).to(q.dtype)


def longest_sum(sizes: Mapping[str, Any]) -> int:
    """The gradients of the matrices that mix heads; without them a product, or the gradient of the bias."""
    if "talking_heads" in sizes.get("without", ()):
        return max(sizes[name] for name in ("B", "N", "M", "D", "Dv"))
    return int(sizes["B"] * sizes["N"] * sizes["M"])


CASES = (
    {"B": 2, "heads": 3, "N": 5, "M": 6, "D": 4, "Dv": 8, "scale": 0.5},
    {"B": 1, "heads": 8, "N": 49, "M": 49, "D": 32, "Dv": 128, "scale": 32**-0.5, "without": ("talking_heads",)},
    {"B": 3, "heads": 1, "N": 1, "M": 33, "D": 7, "Dv": 1, "scale": 0.4},
)
OPERATOR = Operator(
    "biased_attention", SIGNATURE, plain, limited_sizes, limits=LIMIT_NAMES, cases=CASES, longest_sum=longest_sum
)
