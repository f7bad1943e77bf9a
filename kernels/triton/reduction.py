"""Sums that are split over programs and added up in order."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from effattn._triton.configs import ADDED_UP, ROWS_ADDED_UP
from effattn._triton.tiles import tile_and_group


@triton.jit
def _add_up(rows, sums, count, floats, part_rows, COUNT: tl.constexpr):
    """Rows of numbers, one after the other: program (piece of the numbers, part of the rows, group)."""
    pieces, parts = tl.cdiv(floats, COUNT), tl.cdiv(count, part_rows)
    program, group = tile_and_group(pieces * parts)
    piece, part = program % pieces, program // pieces
    at = piece * COUNT + tl.arange(0, COUNT)
    inside = at < floats
    total = tl.zeros((COUNT,), tl.float32)
    for row in range(part * part_rows, tl.minimum((part + 1) * part_rows, count)):
        total += tl.load(rows + (group.to(tl.int64) * count + row) * floats + at, mask=inside, other=0.0)
    tl.store(sums + (group.to(tl.int64) * parts + part) * floats + at, total, mask=inside)


def add_up(rows: torch.Tensor, sums: torch.Tensor) -> None:
    """Fills ``sums`` (groups, ...) with the sums of ``rows`` (groups, count, ...), both contiguous, in float32.

    Many rows are added up in parts first, whose number is a function of the sizes.
    """
    groups, count = rows.shape[:2]
    floats = math.prod(rows.shape[2:])
    if floats * groups == 0 or count == 0:
        sums.zero_()
        return
    part_rows = count if count <= ROWS_ADDED_UP else math.isqrt(count - 1) + 1
    parts = -(-count // part_rows)
    into = rows.new_empty(groups, parts, floats) if parts > 1 else sums
    grid = (triton.cdiv(floats, ADDED_UP) * parts * groups,)
    _add_up[grid](rows, into, count, floats, part_rows, COUNT=ADDED_UP, num_warps=4)
    if parts > 1:
        add_up(into, sums)


def new_partial(grad: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Where ``count`` parts of a sum are written: itself if it is one."""
    return grad if grad is None or count == 1 else grad.new_empty(1, count, *grad.shape)


def add_up_partial(partial: torch.Tensor | None, grad: torch.Tensor | None) -> None:
    """Of what :func:`new_partial` made."""
    if partial is not None and grad is not None and partial is not grad:
        add_up(partial, grad)
