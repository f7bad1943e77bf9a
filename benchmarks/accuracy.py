"""How far whole models under autocast are from float64: accelerated against stock, over seeds of weights and input."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import nn

import effattn
from effattn import testing

MODELS = (
    *(f"efficientvit_{size}" for size in ("b0", "b1", "b2", "b3", "l1", "l2", "m0", "m3", "m5")),
    *(f"efficientformer_{size}" for size in ("l1", "l3")),
    *(f"efficientformerv2_{size}" for size in ("s0", "s1", "s2")),
)


class Ratio(NamedTuple):
    """Of the error of accelerated models to that of stock ones, over seeds.

    Args:
        mean: geometric.
        standard_error: of the mean, as a part of it.
    """

    mean: float
    standard_error: float
    smallest: float
    largest: float

    @staticmethod
    def of(ratios: Sequence[float]) -> Ratio:
        logs = [math.log(ratio) for ratio in ratios]
        return Ratio(math.exp(fmean(logs)), stdev(logs) / len(logs) ** 0.5, min(ratios), max(ratios))


def errors(name: str, seed: int, dtype: torch.dtype, size: int = 224) -> tuple[float, float]:
    """Relative errors (norm) of a model of timm, stock and accelerated, under autocast on the CPU."""
    torch.manual_seed(seed)
    stock: nn.Module = testing.import_timm().create_model(name)
    testing.randomise_batch_norm(stock, seed)
    testing.randomise_what_starts_at_zero(stock, seed)
    stock.train(False)  # some of timm's return nothing
    fast = copy.deepcopy(stock)
    effattn.accelerate(fast)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        # effattn's reference: timm's attention computes in float32 whatever comes.
        truth = copy.deepcopy(fast).double()(x.double())
        with torch.autocast("cpu", dtype):
            outs = stock(x), fast(x)
    scale = torch.linalg.vector_norm(truth).item()
    stock_error, fast_error = (testing.error(out, truth) / scale for out in outs)
    return stock_error, fast_error


def rows(models: Iterable[str], seeds: int, dtype: torch.dtype = torch.bfloat16) -> Iterable[list[Any]]:
    """A row a model, as :data:`HEADERS` says."""
    for name in models:
        pairs = [errors(name, seed, dtype) for seed in range(seeds)]
        ratio = Ratio.of([fast / stock for stock, fast in pairs])
        medians = (sorted(column)[seeds // 2] for column in zip(*pairs, strict=True))
        yield [name, *medians, ratio.mean, ratio.standard_error, ratio.smallest, ratio.largest]


HEADERS = ("model", "stock", "effattn", "ratio", "± ", "smallest", "largest")
