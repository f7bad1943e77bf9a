"""biased_attention on a GPU, with and without talking heads."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

import effattn
from benchmarks.gpu.measured import BATCHES, Measured, Shape, Sizes
from benchmarks.gpu.runner import STOCK, Function
from effattn.ops import OPERATORS
from effattn.ops._plain import mix_heads
from effattn.testing import make_arguments

OPERATOR = OPERATORS["biased_attention"]
PLAIN = ("talking_heads",)
FORMS = {"": PLAIN, " with talking heads": ()}


def _sizes(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, value_dim: int, without: tuple[str, ...] = PLAIN
) -> Sizes:
    return {
        **{"B": batch, "heads": heads, "N": queries, "M": keys, "D": head_dim, "Dv": value_dim},
        **{"scale": head_dim**-0.5, "without": without},
    }


def _make(sizes: Sizes, dtype: torch.dtype, order: str) -> list[Any]:
    """What is added to all weights is of their size: it would hide an error in them."""
    arguments = make_arguments(OPERATOR, sizes, dtype, order)
    for t in arguments[4][3:]:
        t /= sizes["M"]
    return arguments


def _ours(*arguments: Any) -> torch.Tensor:
    *tensors, mixing, scale = arguments
    return effattn.biased_attention(*tensors, scale=scale, talking_heads=mixing or None)


def _stock(*arguments: Any) -> torch.Tensor:
    q, k, v, bias, mixing, scale = arguments
    logits = scale * (q @ k.mT) + bias.to(q.dtype)
    weights = mix_heads(logits, mixing[:2]).softmax(dim=-1)
    return mix_heads(weights, mixing[2:]) @ v


def _sdpa(*arguments: Any) -> torch.Tensor:
    q, k, v, bias, _, scale = arguments
    return functional.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=scale)


def _peers(sizes: Sizes) -> dict[str, Function]:
    return {STOCK: _stock} | ({"SDPA": _sdpa} if sizes["without"] else {})


def _flops(sizes: Sizes) -> int:
    heads = sizes["heads"]
    mixing = 0 if sizes["without"] else 2 * heads
    return int(2 * sizes["B"] * heads * sizes["N"] * sizes["M"] * (sizes["D"] + sizes["Dv"] + mixing))


MEASURED = Measured(
    OPERATOR,
    _ours,
    _peers,
    _flops,
    tiny=(
        Shape("tiny", _sizes(1, 2, 5, 6, 4, 8)),
        Shape("tiny, talking", _sizes(1, 3, 5, 6, 4, 8, ())),
    ),
    smoke={
        form: [
            Shape("as many keys", _sizes(2, 4, 49, 49, 16, 32, without)),
            Shape("more keys", _sizes(1, 2, 70, 133, 32, 24, without)),
        ]
        for form, without in FORMS.items()
    },
    suite="gpu-biased",
    title="biased attention",
    shapes=(
        *(Shape(f"EfficientFormer-L1, batch {batch}", _sizes(batch, 8, 49, 49, 32, 128)) for batch in BATCHES),
        *(Shape(f"EfficientFormerV2, batch {batch}", _sizes(batch, 8, 49, 49, 32, 128, ())) for batch in (1, 256)),
        Shape("1024 tokens, batch 16", _sizes(16, 8, 1024, 1024, 32, 64)),
    ),
    make=_make,
    on_a_gpu={form: Shape("16 images", _sizes(16, 8, 49, 49, 32, 128, without)) for form, without in FORMS.items()},
)
