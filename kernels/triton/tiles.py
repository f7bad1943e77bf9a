"""Tiles of tokens and channels in memory, and how programs are numbered."""

from __future__ import annotations

import triton
import triton.language as tl

from effattn._triton.numerics import round_to


@triton.jit
def tile_and_group(tiles):
    """The program's; in one dimension of the grid, since the others end at 65535."""
    program = tl.program_id(0)
    return program % tiles, program // tiles


@triton.jit
def group_begin(base, group, size1, size2, stride0, stride1, stride2):
    """Where a group begins; groups are numbered over three dimensions, whose last two have these sizes."""
    outer, last = group // size2, group % size2
    return (
        base
        + (outer // size1).to(tl.int64) * stride0
        + (outer % size1).to(tl.int64) * stride1
        + last.to(tl.int64) * stride2
    )


@triton.jit
def _tile(begin, token, tokens, token_stride, first, CHANNELS: tl.constexpr, channels, channel_stride):
    """Pointers to (tokens, CHANNELS) from channel ``first`` on, and which of them are inside."""
    channel = first + tl.arange(0, CHANNELS)
    at = begin + token[:, None].to(tl.int64) * token_stride + channel[None, :].to(tl.int64) * channel_stride
    return at, (token[:, None] < tokens) & (channel[None, :] < channels)


@triton.jit
def load_tile(begin, token, tokens, token_stride, first, CHANNELS: tl.constexpr, channels, channel_stride):
    at, inside = _tile(begin, token, tokens, token_stride, first, CHANNELS, channels, channel_stride)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_tile(x, begin, token, tokens, token_stride, first, CHANNELS: tl.constexpr, channels, channel_stride):
    at, inside = _tile(begin, token, tokens, token_stride, first, CHANNELS, channels, channel_stride)
    tl.store(at, round_to(x, begin.dtype.element_ty), mask=inside)
