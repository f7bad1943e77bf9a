"""What any operator computes on the CPU: results and gradients against float64 in every dtype, memory order and
instruction set, sizes of zero, NaN and infinity, the same bits for every number of threads."""

from __future__ import annotations

import pytest
import torch
from specified import check_against_float64, mapped, with_gradients

from effattn import use_backend
from effattn.functional import _called
from effattn.ops import OPERATORS
from effattn.testing import ORDERS, make_arguments

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise, pytest.mark.usefixtures("poisoned_allocations")]

CALLS = [pytest.param(op, case, id=f"{op.name}-{i}") for op in OPERATORS.values() for i, case in enumerate(op.cases)]
IN_DTYPES = [
    pytest.param(op, case, dtype, id=f"{op.name}-{i}-{dtype}")
    for op in OPERATORS.values()
    for i, case in enumerate(op.cases)
    for dtype in op.dtypes
]
FIRST = [pytest.param(op, op.cases[0], id=op.name) for op in OPERATORS.values()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("operator", "case", "dtype"), IN_DTYPES)
def test_against_float64(isa, operator, case, dtype, order):
    check_against_float64(operator, case, dtype, order, "cpu")


@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_the_same_bits_for_every_number_of_threads(threads, operator, case):
    arguments, results = make_arguments(operator, case), []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(with_gradients(operator, operator, arguments, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(result, other[name]) for name, result in results[0].items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_nan_and_infinity_come_out_as_in_the_plain_formulation(isa, operator, case, value):
    """Of each image, one element; of weights it depends on how a convolution pads."""
    names = [a.name for a in operator.signature.arguments if a.is_image]
    for i, name in enumerate(names):
        arguments = make_arguments(operator, case)
        t = arguments[i][0] if isinstance(arguments[i], list) else arguments[i]
        t.view(-1)[t.numel() // 2] = value
        with torch.no_grad():
            out, plain = (call(*arguments) for call in (operator, operator.plain))
        out, plain = (t[0] if isinstance(t, tuple) else t for t in (out, plain))
        assert torch.equal(out.isnan(), plain.isnan()), name
        assert torch.equal(out.isfinite(), plain.isfinite()), name


def sizes_of_zero():
    return [
        pytest.param(op, {**op.cases[0], name: 0 if size else ()}, id=f"{op.name}-{name}")
        for op in OPERATORS.values()
        for name, size in op.cases[0].items()
        if isinstance(size, int)
        and name not in {a.name for a in op.signature.arguments}
        and op.signature.out.kind != "kept"  # there are no statistics of nothing
    ]


@pytest.mark.parametrize(("operator", "case"), sizes_of_zero())
def test_sizes_of_zero(operator, case):
    """As the plain formulation has them: an error of both, or the same results."""
    arguments = make_arguments(operator, case)
    error = operator.signature.error(arguments)
    if error is None:
        check_against_float64(operator, case, torch.float32, "first", "cpu")
        return
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(ValueError) as raised:
            _called(operator, *arguments)
        assert str(raised.value) == str(error)


@pytest.mark.parametrize("scale", [300.0, 1e4])
@pytest.mark.parametrize(("operator", "case"), [call for call in FIRST if torch.float16 in call.values[0].dtypes])
def test_large_float16(operator, case, scale):
    """Finite wherever the truth is something that float16 holds."""
    arguments = make_arguments(operator, case, torch.float16)
    for i in range(operator.signature.images):
        arguments[i] = (arguments[i].float() * scale).clamp(-65504, 65504).half()
    truth = with_gradients(operator, operator.plain, mapped(torch.Tensor.double, arguments), torch.float16)
    results = with_gradients(operator, operator, arguments, torch.float16)
    for name, result in results.items():
        assert result[truth[name].abs() < 65000].isfinite().all(), name
