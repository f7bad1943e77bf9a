"""The tolerance of every result, from what a formulation is off when each of its operations rounds once.

The error that a result may have, as a norm, is

    |rounded(truth) - truth| + 4 sqrt(r (1 + log2 n)) noise

The first term is what a result in the dtype of the output is off at the least. ``noise`` is the error of the plain
formulation when every operation rounds its result to float32 once and is exact otherwise (Monte Carlo arithmetic:
float64, each result off by up to float32's rounding error, uniformly; the root mean square of 4 or 64 draws). In a
matrix product or a convolution every product rounds too. So the noise knows the operator's own cancellations: the
gradient of a softmax with a weight of nearly 1, or a sum whose terms cancel, is as bad in every formulation.

But a sum of n numbers rounds each of them not once but log2 n times if it is made pairwise. Kernels add up in blocks,
which comes near to that; one long chain of sums does not, and is found out. Errors of independent roundings grow with
the root of their number, hence the root, with ``n`` the terms of the operator's longest sum
(``Operator.longest_sum``). ``r`` is how often a product is rounded: once, or four times where tensor cores make it of
three products of narrower parts (``GPU_ROUNDINGS``: of two splits and two additions). Four standard deviations,
because a single number is beyond three in one of 370 cases, and beyond four in one of 16,000.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

#: By name.
Results = dict[str, torch.Tensor]
ROUNDING = 2.0**-24  # float32's unit roundoff: half an ulp, relative to the smallest number of its binade
#: Four draws are enough to estimate the noise of many numbers. Of a few numbers, all draws may be small by chance: more
#: are made where a result is beyond the first estimate.
DRAWS, MANY_DRAWS = 4, 64
CPU_ROUNDINGS, GPU_ROUNDINGS = 1, 4
#: Of a relu's argument, relative to the largest: below it, a rounding decides about a gradient.
NEAR_ZERO = 1e-6


class RoundedToFloat32(TorchDispatchMode):
    """In which every result in float64 is off by as much as float32 may round it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.is_decided_by_rounding = False
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _IN_PARTS:
            return _IN_PARTS[func](self._off, *args)
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.relu.default and args[0].numel() > 0:
            size = args[0].abs()
            self.is_decided_by_rounding |= bool(((size > 0) & (size < NEAR_ZERO * size.max())).any())
        if func in _CONTRACTIONS:
            terms = func(*tree_map_only(torch.Tensor, torch.square, args), **(kwargs or {}))  # their sums of squares
            out = tree_map(lambda t, squares: None if t is None else self._off(t, squares.sqrt()), out, terms)
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        return out if is_view else tree_map_only(torch.Tensor, self._off, out)

    def _off(self, t: torch.Tensor, of: torch.Tensor | None = None) -> torch.Tensor:
        """By a rounding of a number of the size of ``of``, by default of the result."""
        if t.dtype != torch.float64:
            return t
        rounding = torch.empty(t.shape, dtype=t.dtype).uniform_(-ROUNDING, ROUNDING, generator=self._generator)
        return t.addcmul(t if of is None else of, rounding)


def _softmax(off: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dim: int, _: bool) -> torch.Tensor:
    if x.numel() == 0:
        return x
    weights = off(off(off(x - x.amax(dim, keepdim=True)).exp()))  # twice: exponentials are right to one unit, not half
    return off(weights / off(weights.sum(dim, keepdim=True)))


def _softmax_backward(
    off: Callable[[torch.Tensor], torch.Tensor], grad: torch.Tensor, out: torch.Tensor, dim: int, _: torch.dtype
) -> torch.Tensor:
    terms = off(grad * out)
    return off(terms - off(out * off(terms.sum(dim, keepdim=True))))


#: Operators of torch that add up products: each product rounds, which shows where they cancel.
_CONTRACTIONS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
}
#: Operators of torch that are several operations, between which much cancels.
_IN_PARTS: dict[Any, Callable[..., torch.Tensor]] = {
    torch.ops.aten._softmax.default: _softmax,
    torch.ops.aten._softmax_backward_data.default: _softmax_backward,
}


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the difference, absolute."""
    return torch.linalg.vector_norm(result.double() - truth).item()


def bounds(
    compute: Callable[[], Results],
    longest_sum: int,
    roundings: int = CPU_ROUNDINGS,
    rounded: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, t: t.float(),
    draws: int = DRAWS,
) -> tuple[Results, dict[str, float], bool]:
    """The truth, the tolerance of each result, and whether a rounding decides about a gradient.

    Args:
        compute: the plain formulation in float64.
        longest_sum: how many terms are added up at most for one number.
        roundings: of a product.
        rounded: of a result's name and truth, that in the dtype which is expected.
        draws: of the noise.
    """
    truth = compute()
    modes = [RoundedToFloat32(draw) for draw in range(draws)]
    drawn = []
    for mode in modes:
        with mode:
            drawn.append(compute())
    allowed = {}
    for name, t in truth.items():
        noise = math.sqrt(sum(error(draw[name], t) ** 2 for draw in drawn) / draws)
        of_a_term = roundings * (1 + math.log2(max(longest_sum, 1)))
        allowed[name] = error(rounded(name, t), t) + 4 * math.sqrt(of_a_term) * noise + math.ulp(0.0)
    return truth, allowed, any(mode.is_decided_by_rounding for mode in modes)


def too_large(results: Results, truth: Results, allowed: Mapping[str, float]) -> dict[str, float]:
    """By name, the errors above what is allowed, in units of it."""
    for name, t in truth.items():
        assert results[name].shape == t.shape, name
    ratios = {name: error(results[name].cpu(), t) / allowed[name] for name, t in truth.items()}
    return {name: ratio for name, ratio in ratios.items() if not ratio <= 1}


def check(results: Results, truth: Results, allowed: Mapping[str, float]) -> None:
    """Compares results with the truth."""
    found = too_large(results, truth, allowed)
    assert not found, found


def check_against(
    compute: Callable[[], Results], results: Results, longest_sum: int, roundings: int = CPU_ROUNDINGS
) -> None:
    """Compares results in the dtypes that are expected with the plain formulation in float64 (:func:`bounds`)."""
    for draws in (DRAWS, MANY_DRAWS):
        truth, allowed, _ = bounds(compute, longest_sum, roundings, lambda name, t: t.to(results[name].dtype), draws)
        found = too_large(results, truth, allowed)
        if not found:
            return
    raise AssertionError(found)
