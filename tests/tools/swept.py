"""Sizes at which kernels of an instruction set may go wrong."""

from __future__ import annotations

from effattn import _library

#: Of the widest vectors: in the full tier every instruction set is tried on what these need.
WIDEST = 16
is_full = False


def swept(isa: str, *more: int, vectors: int = 2) -> list[int]:
    """Each size up to beyond so many of its vectors, with all remainders and rows of blocks, and ``more``."""
    lanes = next(row["lanes"] for row in _library._C.isas() if row["name"] == isa)
    return sorted({*range(1, vectors * (WIDEST if is_full else lanes) + 4), *more})
