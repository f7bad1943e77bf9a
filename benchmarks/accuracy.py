"""How far whole models under autocast are from float64: accelerated against stock, over seeds of weights and input."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median, stdev

import torch
from tabulate import tabulate
from torch import nn

import effattn
from effattn import testing, tolerance

MODELS = (
    *(f"efficientvit_{size}" for size in ("b0", "b1", "b2", "b3", "l1", "l2", "m0", "m3", "m5")),
    *(f"efficientformer_{size}" for size in ("l1", "l3")),
    *(f"efficientformerv2_{size}" for size in ("s0", "s1", "s2")),
)


def table(models: Iterable[str], seeds: int, size: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """A row a model: median errors, and the geometric mean of their ratio with its standard error.

    A mean that is above 1 by less than two standard errors is noise.
    """
    rows = []
    for name in models:
        pairs = [errors(name, seed, size, dtype) for seed in range(seeds)]
        stock, fast = (f"{median(column):.2e}" for column in zip(*pairs, strict=True))
        ratios = [fast / stock for stock, fast in pairs]
        mean, standard_error = geometric_mean(ratios)
        rows.append([name, stock, fast, f"{mean:.3f} ± {standard_error:.3f}", min(ratios), max(ratios)])
    headers = ["model", "stock", "effattn", "ratio", "smallest", "largest"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=".3f", disable_numparse=[1, 2, 3])


def geometric_mean(ratios: Sequence[float]) -> tuple[float, float]:
    """And its standard error."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = math.exp(fmean(logs))
    return mean, mean * stdev(logs) / len(logs) ** 0.5


def errors(name: str, seed: int, size: int, dtype: torch.dtype) -> tuple[float, float]:
    """Relative errors (norm) of a model of timm under autocast on the CPU, stock and accelerated, on one image."""
    torch.manual_seed(seed)
    stock: nn.Module = testing.import_timm().create_model(name)
    testing.randomise_batch_norm(stock, seed)
    testing.randomise_what_starts_at_zero(stock, seed)
    stock.train(False)  # timm's eval() fails: some of its train() return nothing
    fast = copy.deepcopy(stock)
    effattn.accelerate(fast)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        # By effattn's reference: timm's LiteMLA computes in float32 whatever comes.
        truth = copy.deepcopy(fast).double()(x.double())
        with torch.autocast("cpu", dtype):
            outs = stock(x), fast(x)
    norm = torch.linalg.vector_norm(truth).item()
    stock_error, fast_error = (tolerance.error(out, truth) / norm for out in outs)
    return stock_error, fast_error
