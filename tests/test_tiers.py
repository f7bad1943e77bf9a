"""What the short tier takes, and which skips are failures where all tools should be there."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace

import pytest
import skips
import tiers

ROWS = list(product(range(4), range(3), range(3), range(8)))


@pytest.mark.parametrize(("strength", "most"), [(1, 8), (2, 40), (3, 150)])
def test_all_combinations_of_so_many_parameters_occur(strength, most):
    chosen = [ROWS[i] for i in tiers.cover(ROWS, strength)]
    assert len(chosen) <= most
    for columns in combinations(range(4), strength):
        assert len({tuple(row[c] for c in columns) for row in chosen}) == len(
            {tuple(row[c] for c in columns) for row in ROWS}
        )


def test_rows_of_one_parameter_are_all_taken():
    assert tiers.cover([(0,), (1,), (2,)]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("Skipped: could not import 'triton': No module named 'triton'", "failed"),
        ("Skipped: no nvcc here, so there are no CUDA kernels to look at", "failed"),
        ("Skipped: this processor has no avx512; its logic runs as avx2_wide", "skipped"),
        ("Skipped: needs a GPU", "skipped"),
    ],
)
def test_a_missing_tool_is_a_failure(reason, outcome):
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("test_file.py", 1, reason))
    skips.judge(report)
    assert report.outcome == outcome
