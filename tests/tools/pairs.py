"""Pairwise coverage: of a full product of parameters, so few combinations that each pair of values still occurs.

Faults of kernels hang on one parameter or on two together (a layout and a dtype, a case and an instruction set). A test
with the marker ``pairwise`` runs on the combinations chosen here; ``--full`` runs all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def cover(rows: Sequence[tuple[int, ...]]) -> list[int]:
    """Positions of the rows that are taken: greedily, the one with the most new pairs, of several the first.

    Rows of one column have no pairs, and all are taken.
    """
    pairs = [set(combinations(enumerate(row), 2)) or {((0, value),) for value in row} for row in rows]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)
