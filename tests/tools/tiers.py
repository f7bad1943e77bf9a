"""What the short tier takes of a test: some parameters, or so few combinations of all that each pair still occurs.

Faults of kernels hang on one parameter or on two together (a layout and a dtype, a case and an instruction set). A test
with the marker ``pairwise`` or ``each_value`` runs on the combinations chosen here; ``--full`` runs all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest


def full(*values: Any, id: str | None = None) -> Any:
    """A parameter of the full tier alone, which stands beside those of both."""
    return pytest.param(*values, marks=pytest.mark.full, id=id)


def cover(rows: Sequence[tuple[int, ...]], strength: int = 2) -> list[int]:
    """Positions of rows in which every ``strength`` columns have all their combinations.

    Chosen greedily: the row with the most new combinations, of several the first.
    """
    covered = [set(combinations(enumerate(row), min(strength, len(row)))) for row in rows]
    missing = set().union(*covered)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(covered[i] & missing))
        chosen.append(best)
        missing -= covered[best]
    return sorted(chosen)
