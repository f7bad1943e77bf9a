"""Whether two results are those of one function.

Formulations of one function are apart by roundings, some units in the last digit; another function is apart by a share
of the result. Between the two lies what is asked for here: the first two thirds of the digits that the dtype has, of
the largest number that is expected (2e-5 in float32, 4e-11 in float64, 1e-2 in float16). Where all that is expected are
zeros, so are the results. What kernels may be off is told by effattn/tolerance.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from effattn.tolerance import error


def allowed(dtype: torch.dtype) -> float:
    """Of the largest number."""
    return torch.finfo(dtype).eps ** (2 / 3) if dtype.is_floating_point else 0.0


def is_same(result: torch.Tensor, expected: torch.Tensor, largest: float | None = None) -> bool:
    """``largest`` replaces the largest number of what is expected, where that is zero but for rounding."""
    return _apart(result, expected, largest) <= allowed(result.dtype)


def assert_same(result: torch.Tensor, expected: torch.Tensor, largest: float | None = None) -> None:
    """Says how far the results are apart."""
    if not is_same(result, expected, largest):
        apart = _apart(result, expected, largest)
        raise AssertionError(f"apart by {apart:.2e} of the largest number, allowed are {allowed(result.dtype):.2e}")


def assert_all_same(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """The largest number is that of all: a gradient in front of a BatchNorm is zero but for rounding."""
    largest = max(t.abs().max().item() for t in expected)
    for result, t in zip(results, expected, strict=True):
        assert_same(result, t, largest)


def assert_as_near(result: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor) -> None:
    """That a result in a narrow dtype is as near to the truth as that of a stock module, which rounds as often.

    The norms of two draws of n independent errors are apart by a share of about 1 / sqrt(n), of which four are allowed.
    Independent are those of all numbers, or those of a weight between all channels, which are the same in every token.
    """
    channels = result.shape[1] if result.dim() == 4 else result.shape[-1]
    independent = min(result.numel(), channels**2)
    mine, theirs = error(result, truth), error(stock, truth)
    assert mine <= (1 + 4 / math.sqrt(independent)) * theirs, f"an error of {mine:.2e}, that of stock is {theirs:.2e}"


def _apart(result: torch.Tensor, expected: torch.Tensor, largest: float | None) -> float:
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    if torch.equal(result, expected):  # also where all are zero, or there are none
        return 0.0
    scale = expected.abs().max().item() if largest is None else largest
    apart = (result.double() - expected.double()).abs().max().item()
    return apart / scale if scale else math.inf
