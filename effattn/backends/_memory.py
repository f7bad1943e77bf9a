"""The memory order of outputs, for fake tensors; csrc/tensor.h does the same for real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch


def empty_in_order_of(like: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """A dense tensor of ``sizes``, its dimensions in memory in the order of ``like``'s, expanded ones outermost."""
    return _empty(like, sizes, _order(like))


def empty_image_in_order_of(like: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The same for images (B, C, H, W), whose rows must follow each other; contiguous where ``like``'s do not, as in a
    transposed one."""
    order = _order(like)
    return _empty(like, sizes, order if (2, 3) in pairwise(order) else list(range(4)))


def _order(like: torch.Tensor) -> list[int]:
    """Dimensions, outermost first; insertion keeps equal strides in order."""
    strides = [math.inf if step == 0 else step for step in like.stride()]
    order: list[int] = []
    for dim in range(len(strides)):
        at = dim
        while at > 0 and strides[order[at - 1]] < strides[dim]:
            at -= 1
        order.insert(at, dim)
    return order


def _empty(like: torch.Tensor, sizes: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    dense = [1] * len(sizes)
    step = 1
    for dim in reversed(order):
        dense[dim] = step
        step = step * torch.sym_max(sizes[dim], 1)
    if type(step) is int and step > torch.iinfo(torch.int64).max:
        raise RuntimeError(f"expected a result whose elements can be counted, not one of shape {tuple(sizes)}")
    return like.new_empty_strided(sizes, dense)
