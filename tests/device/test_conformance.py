"""What any operator does on a GPU, as its specification has it: results and gradients against float64, wrong
arguments."""

from __future__ import annotations

import pytest
import torch
from specified import check_against_float64, mapped
from wrong_calls import WRONG_CALLS

from effattn import registry
from effattn.ops import OPERATORS
from effattn.testing import ORDERS

CALLS = [pytest.param(op, case, id=f"{op.name}-{i}") for op in OPERATORS.values() for i, case in enumerate(op.cases)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def served(operator, backend):
    """Skips what the backend has no kernels of."""
    reasons = next(b for b in registry.ORDER if b.name == backend).reasons(
        operator.name, torch.device("cpu"), torch.float32, ()
    )
    if f"has no {operator.name}" in reasons:
        pytest.skip(f"the {backend} backend has no {operator.name}")


@pytest.mark.pairwise
@pytest.mark.numerics
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_against_float64(device, backend, operator, case, dtype, order):
    served(operator, backend)
    check_against_float64(operator, case, dtype, order, backend, device)


@pytest.mark.each_value
@pytest.mark.parametrize(("operator", "arguments", "error", "name", "text"), WRONG_CALLS)
def test_operators_refuse_in_the_same_words(device, backend, ops, operator, arguments, error, name, text):
    served(operator, backend)
    expected = str(operator.signature.error(arguments, weights="float32"))
    there = mapped(lambda t: t if t.device.type == "meta" or t.layout != torch.strided else t.to(device), arguments)
    with pytest.raises(RuntimeError) as raised:
        getattr(ops, operator.name)(*there)
    if error is ValueError and "device" not in expected:
        assert str(raised.value).endswith(f"{operator.name}: {expected}")
