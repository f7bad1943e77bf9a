"""Weights in the order in which the compiled operators of inference read them, made once for many calls.

The compiled operators check shapes, so that a difference between what is written here and there is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

#: Outputs of a block of a 1x1 convolution; ``kPackedOutputs`` of kernels/cpu.
OUTPUTS = 32
#: Channels of a head's q, k or v are a multiple of so many; ``kWholeVectors`` of kernels/cpu.
CHANNELS = 16


def rounded(channels: int, to: int = CHANNELS) -> int:
    """The next multiple."""
    return -(-channels // to) * to


def padded(t: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """With zeros behind the last of a dimension."""
    behind = t.dim() - 1 - dim % t.dim()
    return functional.pad(t, (0, 0) * behind + (0, size - t.shape[dim]))


def pack_projection(weight: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs) -> (blocks, inputs, OUTPUTS)"""
    whole = padded(weight, 0, rounded(weight.shape[0], OUTPUTS))
    return whole.unflatten(0, (-1, OUTPUTS)).transpose(1, 2).contiguous()


def unpack_projection(packed: torch.Tensor, outputs: int) -> torch.Tensor:
    """What :func:`pack_projection` was given."""
    return packed.transpose(1, 2).flatten(0, 1)[:outputs]


def of_whole_heads(t: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads * channels, ...) -> (heads * rounded(channels), ...)"""
    by_head = t.unflatten(0, (heads, -1))
    return padded(by_head, 1, rounded(by_head.shape[1])).flatten(0, 1)


def of_heads(t: torch.Tensor, heads: int, channels: int) -> torch.Tensor:
    """What :func:`of_whole_heads` was given."""
    return t[: heads * rounded(channels)].unflatten(0, (heads, -1))[:, :channels].flatten(0, 1)


def joined(parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """Parts of the first dimension one behind the other, each with zeros up to its size."""
    return torch.cat([padded(part, 0, size) for part, size in zip(parts, sizes, strict=True)])
