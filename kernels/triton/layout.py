"""Strides of tensors as kernels address them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Leading dimensions that kernels address each by a stride of its own.
MAX_DIMENSIONS = 3


@dataclass(frozen=True)
class Groups:
    """The leading dimensions of some tensors, merged where the strides of all of them allow it."""

    #: Sizes of the merged dimensions, and of each the indices of those that it is made of.
    merged: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(*tensors: torch.Tensor) -> Groups:
        """Of (..., tokens, channels). Where there are no elements, any strides will do."""
        sizes = tensors[0].shape[:-2]
        tensors = tuple(t for t in tensors if t.numel() > 0)
        merged: list[int] = []
        members: list[tuple[int, ...]] = []
        for dim, size in enumerate(sizes):
            if size == 1:
                continue
            if members and all(t.stride(members[-1][-1]) == size * t.stride(dim) for t in tensors):
                merged[-1] *= size
                members[-1] = (*members[-1], dim)
            else:
                merged.append(size)
                members.append((dim,))
        return Groups(tuple(merged), tuple(members))

    @property
    def are_addressable(self) -> bool:
        return len(self.merged) <= MAX_DIMENSIONS

    @property
    def count(self) -> int:
        return math.prod(self.merged)

    @property
    def sizes(self) -> tuple[int, int]:
        """Of the last two of MAX_DIMENSIONS dimensions."""
        _, middle, last = (*(1,) * (MAX_DIMENSIONS - len(self.merged)), *self.merged)
        return middle, last

    def strides(self, t: torch.Tensor) -> tuple[int, ...]:
        """Of MAX_DIMENSIONS dimensions, then of tokens and channels."""
        lead = [t.stride(dims[-1]) for dims in self.members]
        return (*(0,) * (MAX_DIMENSIONS - len(lead)), *lead, t.stride(-2), t.stride(-1))


def with_mergeable_rows(image: torch.Tensor) -> torch.Tensor:
    """Tokens of (B, C, H, W) must be one dimension of one stride; a view in which they are not, a crop, is copied."""
    height, width = image.shape[2:]
    mergeable = height <= 1 or width <= 1 or image.stride(2) == width * image.stride(3)
    return image if mergeable else image.contiguous()


def image_strides(image: torch.Tensor) -> tuple[int, int, int]:
    """Of batch, channels and tokens of (B, C, H, W) with mergeable rows."""
    height, width = image.shape[2:]
    token = image.stride(3) if width > 1 else image.stride(2) if height > 1 else 1
    return image.stride(0), image.stride(1), token


def clear(results: Sequence[Any]) -> None:
    """Of tensors and lists of them."""
    for result in results:
        for t in (result,) if isinstance(result, torch.Tensor) else result:
            t.zero_()
