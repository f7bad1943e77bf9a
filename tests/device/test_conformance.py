"""What any operator does on a GPU, as its specification has it: results and gradients against float64, wrong
arguments."""

from __future__ import annotations

import pytest
import torch
from specified import check_against_float64, mapped
from wrong_calls import WRONG_CALLS

from effattn.backends.triton import LAUNCHERS
from effattn.ops import OPERATORS
from effattn.testing import ORDERS

HERE = [op for op in OPERATORS.values() if op.name in LAUNCHERS]
CALLS = [pytest.param(op, case, id=f"{op.name}-{i}") for op in HERE for i, case in enumerate(op.cases)]
WRONG = [call for call in WRONG_CALLS if call.values[0] in HERE]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.pairwise
@pytest.mark.numerics
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_against_float64(device, backend, operator, case, dtype, order):
    check_against_float64(operator, case, dtype, order, backend, device)


@pytest.mark.each_value
@pytest.mark.parametrize(("operator", "arguments", "error", "name", "text"), WRONG)
def test_operators_refuse_in_the_same_words(device, backend, ops, operator, arguments, error, name, text):
    expected = str(operator.signature.error(arguments, weights="float32"))
    there = mapped(lambda t: t if t.device.type == "meta" or t.layout != torch.strided else t.to(device), arguments)
    with pytest.raises(RuntimeError) as raised:
        getattr(ops, operator.name)(*there)
    if error is ValueError and "device" not in expected:
        assert str(raised.value).endswith(f"{operator.name}: {expected}")
