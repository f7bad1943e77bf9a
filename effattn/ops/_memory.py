"""The memory order of outputs, for fake tensors; csrc/tensor.h does the same for real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def empty_in_order_of(like: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """A dense tensor of ``sizes``, its dimensions in memory in the order of ``like``'s, expanded ones outermost."""
    strides = [math.inf if step == 0 else step for step in like.stride()]
    order: list[int] = []  # outermost first; insertion keeps equal strides in order
    for dim in range(len(sizes)):
        at = dim
        while at > 0 and strides[order[at - 1]] < strides[dim]:
            at -= 1
        order.insert(at, dim)
    dense = [1] * len(sizes)
    step = 1
    for dim in reversed(order):
        dense[dim] = step
        step = step * torch.sym_max(sizes[dim], 1)
    return like.new_empty_strided(sizes, dense)
