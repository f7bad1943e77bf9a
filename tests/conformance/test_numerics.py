"""What any operator computes on any backend: results and gradients against float64 in every dtype and memory order,
second derivatives, sizes of zero, NaN and infinity, the same bits from call to call and for every number of threads."""

from __future__ import annotations

import pytest
import torch
from specified import (
    check_against_float64,
    first_of,
    flattened,
    gradients_through_one_another,
    mapped,
    of_at_least,
    second_derivatives,
    with_gradients,
)

from effattn import use_backend
from effattn.ops import OPERATORS
from effattn.testing import ORDERS, make_arguments, make_image, moved
from effattn.tolerance import CPU_ROUNDINGS, GPU_ROUNDINGS, check_against

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("poisoned_allocations")]

CALLS = [pytest.param(op, case, id=f"{op.name}-{i}") for op in OPERATORS.values() for i, case in enumerate(op.cases)]
FIRST = [pytest.param(op, op.cases[0], id=op.name) for op in OPERATORS.values()]
DTYPES = list(dict.fromkeys(dtype for op in OPERATORS.values() for dtype in op.dtypes))


def there(target, arguments):
    return mapped(lambda t: moved(t, target.device), arguments)


@pytest.mark.every_case
@pytest.mark.pairwise
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_against_float64(target, operator, case, dtype, order):
    check_against_float64(operator, case, dtype, order, target.backend, target.device)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_other_numbers(target, operator, case, dtype):
    """The tolerance is no luck of the numbers that the other tests take."""
    for seed in range(1, 51):
        check_against_float64(operator, case, dtype, "first", target.backend, target.device, seed=1000 * seed)


FORMATS = ("channels_last", "channel slice", "crop", "transposed", "equal rows", "equal columns")


@pytest.mark.pairwise
@pytest.mark.parametrize("gradient", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("operator", "case"), [call for call in FIRST if call.values[0].signature.is_of_images])
def test_images_however_they_lie(target, operator, case, memory_format, gradient):
    def change(arguments):
        arguments[0] = make_image(*arguments[0].shape, memory_format)

    shape = operator.signature.out.shape.sizes(operator.signature.sizes(make_arguments(operator, case)))
    grad_out = make_image(*shape, gradient, seed=5)
    check_against_float64(
        operator, case, torch.float32, "first", target.backend, target.device, change=change, grad_out=grad_out
    )


@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_second_derivatives(target, operator, case):
    """Of what kernels made the first of, under create_graph=True."""
    arguments = make_arguments(operator, case)
    wide = mapped(torch.Tensor.double, arguments)
    roundings = CPU_ROUNDINGS if target.backend == "cpu" else GPU_ROUNDINGS
    results = second_derivatives(operator, operator, there(target, arguments))
    check_against(
        lambda: second_derivatives(operator, operator.plain, wide), results, operator.longest_sum(case), roundings
    )


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_gradients_of_arguments_that_are_made_of_one_another(target, operator, case, create_graph):
    """As of tied weights, or k made of q: no path between arguments is gone twice."""
    arguments = make_arguments(operator, case)
    wide = mapped(torch.Tensor.double, arguments)
    results = gradients_through_one_another(operator, there(target, arguments), create_graph=create_graph)
    check_against(
        lambda: gradients_through_one_another(operator.plain, wide, create_graph=False),
        results,
        operator.longest_sum(case),
        CPU_ROUNDINGS if target.backend == "cpu" else GPU_ROUNDINGS,
    )


@pytest.mark.each_value
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_the_same_bits_in_the_same_places(target, operator, case, order):
    """From call to call; and results lie in memory as the CPU lays them."""
    arguments = make_arguments(operator, case, order=order)
    first, second = (with_gradients(operator, operator, there(target, arguments), torch.float32) for _ in range(2))
    with use_backend("cpu"):
        expected = with_gradients(operator, operator, arguments, torch.float32)
    for name, result in first.items():
        assert torch.equal(result, second[name]), name
        assert result.stride() == expected[name].stride(), name


@pytest.mark.schedule
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_the_same_bits_for_every_number_of_threads(threads, operator, case):
    """Of so much work that there is some for each of them (kernels/cpu/core/parallel.h)."""
    arguments, results = make_arguments(operator, of_at_least(operator, case, 4 * 10**6)), []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(with_gradients(operator, operator, arguments, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(result, other[name]) for name, result in results[0].items())


@pytest.mark.pairwise
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "case"), FIRST)
def test_nan_and_infinity_come_out_as_in_the_plain_formulation(target, operator, case, dtype, value):
    """Of each image, one element; of weights it depends on how a convolution pads. Gradients are finite where those
    of the plain formulation are; whether one is NaN or infinite depends on the order of operations."""
    names = [a.name for a in operator.signature.arguments if a.is_activation]
    for i, name in enumerate(names):
        arguments = make_arguments(operator, case, dtype)
        t = arguments[i][0] if isinstance(arguments[i], list) else arguments[i]
        t.view(-1)[t.numel() // 2] = value
        expected = with_gradients(operator, operator.plain, arguments, dtype)
        results = with_gradients(operator, operator, there(target, arguments), dtype)
        assert torch.equal(results["out"].cpu().isnan(), expected["out"].isnan()), name
        for key, t in expected.items():
            assert torch.equal(results[key].cpu().isfinite(), t.isfinite()), (name, key)


def sizes_of_zero():
    return [
        pytest.param(op, {**op.cases[0], name: 0 if size else ()}, id=f"{op.name}-{name}")
        for op in OPERATORS.values()
        for name, size in op.cases[0].items()
        if isinstance(size, int)
        and name not in {a.name for a in op.signature.arguments}
        and op.signature.out.kind != "kept"  # there are no statistics of nothing
    ]


@pytest.mark.every_case
@pytest.mark.each_value
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "case"), sizes_of_zero())
def test_sizes_of_zero(target, operator, case, dtype):
    """As the plain formulation has them: an error of both, or the same results."""
    arguments = make_arguments(operator, case, dtype)
    error = operator.signature.error(arguments)
    if error is None:
        check_against_float64(operator, case, dtype, "first", target.backend, target.device)
        leaves = mapped(lambda t: t.detach().requires_grad_(), there(target, arguments))
        with use_backend(target.backend):
            grads = torch.autograd.grad(first_of(operator(*leaves)).sum(), flattened(leaves), create_graph=True)
        assert all(grad.shape == leaf.shape for grad, leaf in zip(grads, flattened(leaves), strict=True))
        return
    for backend in (target.backend, "reference"):
        with use_backend(backend), pytest.raises(ValueError) as raised:
            operator(*there(target, arguments))
        assert str(raised.value) == str(error)


@pytest.mark.each_value
@pytest.mark.parametrize("scale", [300.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_large_float16(target, operator, case, dtype, scale):
    """Right, and finite, wherever the truth is something that float16 holds."""
    arguments = make_arguments(operator, case, dtype)
    for i in range(operator.signature.num_activations):
        arguments[i] = (arguments[i].float() * scale).clamp(-65504, 65504).half()
    wide = mapped(torch.Tensor.double, arguments)
    results = with_gradients(operator, operator, there(target, arguments), dtype)
    truth = with_gradients(operator, operator.plain, wide, dtype)
    held = {name: t.abs() < torch.finfo(results[name].dtype).max for name, t in truth.items()}

    def compute():
        return {name: t[held[name]] for name, t in with_gradients(operator, operator.plain, wide, dtype).items()}

    roundings = CPU_ROUNDINGS if target.backend == "cpu" else GPU_ROUNDINGS
    results = {name: t.cpu()[held[name]] for name, t in results.items()}
    check_against(compute, results, operator.longest_sum(case), roundings)
