"""Whether two results are those of one function.

Formulations of one function are apart by roundings, some units in the last digit; another function is apart by a share
of the result. Between the two lies what is asked for here: the first two thirds of the digits that the dtype has, of
the largest number (2e-5 in float32, 4e-11 in float64, 1e-2 in float16). What kernels may be off is told by
effattn/tolerance.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_same(result: torch.Tensor, expected: torch.Tensor, largest: float | None = None) -> bool:
    """``largest`` replaces the largest number of what is expected; numbers below 1 count as 1."""
    return _apart(result, expected, largest) <= _allowed(result)


def assert_same(result: torch.Tensor, expected: torch.Tensor, largest: float | None = None) -> None:
    """Says how far the results are apart."""
    if not is_same(result, expected, largest):
        apart, allowed = _apart(result, expected, largest), _allowed(result)
        raise AssertionError(f"apart by {apart:.2e} of the largest number, allowed are {allowed:.2e}")


def assert_all_same(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """The largest number is that of all: a gradient in front of a BatchNorm is zero but for rounding."""
    largest = max(t.abs().max().item() for t in expected)
    for result, t in zip(results, expected, strict=True):
        assert_same(result, t, largest)


def _apart(result: torch.Tensor, expected: torch.Tensor, largest: float | None) -> float:
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    if result.numel() == 0:
        return 0.0
    scale = expected.abs().max().item() if largest is None else largest
    return (result.double() - expected.double()).abs().max().item() / max(1.0, scale)


def _allowed(result: torch.Tensor) -> float:
    return torch.finfo(result.dtype).eps ** (2 / 3) if result.is_floating_point() else 0.0
