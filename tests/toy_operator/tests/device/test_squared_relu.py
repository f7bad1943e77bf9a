"""squared_relu on GPUs, as its kernels are made: sizes around tiles."""

from __future__ import annotations

import pytest
from specified import check_against_float64

from effattn.ops import OPERATORS
from effattn.testing import ORDERS

pytestmark = [pytest.mark.each_value, pytest.mark.usefixtures("device", "poisoned_allocations")]

OPERATOR = OPERATORS["squared_relu"]
CASES = [
    {"B": 1, "C": 1, "H": 1, "W": 1, "scale": 1.0},
    {"B": 2, "C": 33, "H": 13, "W": 10, "scale": 0.5},
]


@pytest.mark.parametrize("dtype", OPERATOR.dtypes, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.numerics
@pytest.mark.memcheck
def test_sizes_around_tiles(device, backend, case, order, dtype):
    check_against_float64(OPERATOR, case, dtype, order, backend, device)
