"""Wrong arguments, made of every operator's signature: a typed error that names the argument, the same words from the
compiled operators, no crash whatever they are called with."""

from __future__ import annotations

import contextlib
import re

import numpy
import pytest
import torch
from gpu_backends import HERE
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_calls import arguments_of_calls
from specified import first_of, mapped
from torch.autograd import forward_ad
from wrong_calls import CONVERTED_BY_TORCH, WRONG_CALLS, one_larger

from effattn import use_backend
from effattn.ops import INFERENCE_OPERATORS, OPERATORS
from effattn.testing import make_arguments

pytestmark = pytest.mark.arguments


@pytest.mark.parametrize(("operator", "arguments", "error", "name", "text"), WRONG_CALLS + CONVERTED_BY_TORCH)
def test_the_error_names_the_argument(operator, arguments, error, name, text):
    said = set()
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(error) as raised:
            operator(*arguments)
        said.add(str(raised.value))
    with forward_ad.dual_level(), pytest.raises(error) as raised:  # as under any transform, where no kernel refuses
        operator(*arguments)
    said.add(str(raised.value))
    (message,) = said
    argument = message.split(":")[0].split("[")[0]
    if error is ValueError and argument != name:  # a size may be said to be wrong of the other argument that has it
        assert argument in {a.name for a in operator.signature.arguments}
        assert re.search(r"expected (shape .* with|(none or )?\w+ = \d+ tensors|at least one tensor).*, got ", message)
    else:
        assert argument == name and text in message


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_numpys_numbers_are_numbers(operator):
    arguments = make_arguments(operator, operator.cases[0])
    number = {int: numpy.int64, float: numpy.float64}
    options = [number[type(a)](a) if type(a) in number else a for a in arguments]
    expected = first_of(operator(*arguments))
    assert torch.equal(first_of(operator(*options)), expected)
    with use_backend("reference"):
        assert first_of(operator(*options)).shape == expected.shape


def there(target, arguments):
    """On the target's device, but for what is wrong because of where or how it lies."""
    return mapped(
        lambda t: t if t.device.type == "meta" or t.layout != torch.strided else t.to(target.device), arguments
    )


@pytest.mark.each_value
@pytest.mark.parametrize(("operator", "arguments", "error", "name", "text"), WRONG_CALLS)
def test_the_torch_operators_refuse_in_the_same_words(target, operator, arguments, error, name, text):
    expected = operator.signature.error(arguments, of_kernels=True)
    kinds = ("_forward",) if operator.signature.out.kind == "kept" else ("", "_forward")
    for kind in kinds:
        with pytest.raises(RuntimeError) as raised:
            getattr(target.ops, operator.name + kind)(*there(target, arguments))
        said = str(raised.value)
        # A dispatcher comes first: it knows types, and for which layouts there are kernels.
        by_torch = "Expected a value of type" in said or isinstance(raised.value, NotImplementedError)
        assert by_torch or said.endswith(f"{operator.name}: {expected}")


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_the_torch_operators_take_no_float64(target, operator):
    """The plain formulations do, which functions call instead."""
    arguments = there(target, make_arguments(operator, operator.cases[0], torch.float64))
    name = operator.signature.arguments[0].name
    with pytest.raises(RuntimeError, match=f"{name}: expected float32, bfloat16 or float16, got torch.float64"):
        getattr(target.ops, f"{operator.name}_forward")(*arguments)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_a_call_that_was_right_excuses_no_other(target, operator):
    """A backend may remember what it has checked: all that its check asks for counts."""
    forward = getattr(target.ops, f"{operator.name}_forward")
    forward(*there(target, make_arguments(operator, operator.cases[0])))
    for call in WRONG_CALLS:
        of, arguments, *_ = call.values
        if of is operator:
            with pytest.raises(RuntimeError):
                forward(*there(target, arguments))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_the_backward_checks_its_own(target, operator):
    arguments = there(target, make_arguments(operator, operator.cases[0]))
    tensors, options = arguments[: operator.signature.num_tensors], arguments[operator.signature.num_tensors :]
    results = getattr(target.ops, f"{operator.name}_forward")(*arguments)
    out, *kept = results if isinstance(results, tuple) else (results,)
    kept = [out, *kept] if operator.signature.out.kind == "kept" else kept
    backward = getattr(target.ops, f"{operator.name}_backward")
    backward(out, *tensors, *kept, *options)
    names = ["grad_out", *(returned.name for returned in operator.signature.backward_takes)]
    for i, (what, t) in enumerate(zip(names, [out, *kept], strict=True)):
        wrong_ones = {
            f"{what}: expected shape": one_larger(t, t.dim() - 1),
            f"{what}: expected": t.half(),
            f"{what}: expected the device of": t.to("meta"),
            f"{what}: expected a contiguous tensor, got strides": t.mT.contiguous().mT,
        }
        if what in ("grad_out", "out") or target.backend == "triton":  # which copies what is not contiguous
            del wrong_ones[f"{what}: expected a contiguous tensor, got strides"]
        for text, wrong in wrong_ones.items():
            taken = [out, *kept]
            taken[i] = wrong
            with pytest.raises(RuntimeError, match=None if wrong.device.type == "meta" else text):
                backward(taken[0], *tensors, *taken[1:], *options)


# --- anything at all --------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 4), max_size=5)
DTYPES = st.sampled_from([torch.float32] * 6 + [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool])


@st.composite
def any_tensor(draw):
    """Any small tensor: sizes, dtype, permuted, expanded, sliced, sparse, huge and empty, or on the meta device."""
    t = torch.zeros(draw(SIZES)).to(draw(DTYPES))
    for change in draw(st.lists(st.sampled_from(["permute", "expand", "slice", "sparse", "meta", "huge"]), max_size=2)):
        if change == "meta":
            t = t.to("meta")
        elif t.layout != torch.strided:
            continue
        elif change == "permute":
            t = t.permute(draw(st.permutations(range(t.dim()))))
        elif change == "expand":
            t = t.expand(draw(st.integers(0, 3)), *t.shape)
        elif change == "slice" and t.dim():
            t = t[..., ::2]
        elif change == "sparse" and t.dim() and t.device.type == "cpu":
            t = t.to_sparse()
        elif change == "huge":
            t = torch.empty(0, 2 ** draw(st.integers(20, 40)), dtype=t.dtype)
    return t


@st.composite
def changed(draw, t):
    """A tensor of another size, order, dtype or device; or any."""
    change = draw(st.sampled_from(["any", "larger", "smaller", "transposed", "expanded", "half", "double", "meta"]))
    dim = draw(st.integers(0, max(t.dim() - 1, 0)))
    if change == "any" or t.dim() == 0:
        return draw(any_tensor())
    return {
        "larger": lambda: one_larger(t, dim),
        "smaller": lambda: t.narrow(dim, 0, max(t.shape[dim] - 1, 0)),
        "transposed": lambda: t.transpose(0, dim),
        "expanded": lambda: t.narrow(dim, 0, min(t.shape[dim], 1)).expand_as(t),
        "half": t.half,
        "double": t.double,
        "meta": lambda: t.to("meta"),
    }[change]()


@st.composite
def replacement(draw, argument):
    """Another argument of the same type."""
    if isinstance(argument, int):
        return draw(st.sampled_from([-1, 0, 1, 2, 7, 2**31, 2**62, -(2**63)]))
    if isinstance(argument, float):
        return draw(st.floats())
    if isinstance(argument, torch.Tensor):
        return draw(changed(argument))
    if isinstance(argument, str):  # a part of it, more than once, or with other numbers in it
        begin, end = sorted(draw(st.tuples(*[st.integers(0, len(argument))] * 2)))
        other = draw(st.sampled_from(["", argument[begin:end] * 2, *"0179-%,=()x \n"]))
        return argument[:begin] + other + argument[end if draw(st.booleans()) else begin :]
    if argument is None:
        return draw(st.one_of(st.none(), any_tensor()))
    taken = list(argument)
    if any(isinstance(element, torch.Tensor) for element in taken) or not taken:
        changes = st.one_of(st.none(), st.lists(any_tensor(), max_size=5), st.just(taken[:-1]), st.just(taken * 2))
    else:
        changes = st.lists(replacement(taken[0]), max_size=5)
    if taken and draw(st.booleans()):
        i = draw(st.integers(0, len(taken) - 1))
        return [*taken[:i], draw(replacement(taken[i])), *taken[i + 1 :]]
    return draw(changes)


@st.composite
def almost_fitting(draw, calls):
    """Arguments of one of the calls, a few of them replaced."""
    arguments = list(draw(st.sampled_from(calls)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    arguments[0] = arguments[0].to(dtype)
    for i in draw(st.lists(st.integers(0, len(arguments) - 1), max_size=3, unique=True)):
        arguments[i] = draw(replacement(arguments[i]))
    return arguments


@pytest.mark.each_value
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_operators_survive_anything(target, operator, examples):
    """They compute or raise; nothing crashes the process or hangs."""
    inference, forward, backward = (
        getattr(target.ops, operator.name + kind, None) for kind in ("", "_forward", "_backward")
    )
    kept_names = len(operator.signature.backward_takes)
    calls = [make_arguments(operator, case) for case in operator.cases]
    computed = 0

    @settings(max_examples=examples, deadline=None, database=None)
    @given(almost_fitting(calls), st.lists(any_tensor(), min_size=1 + kept_names, max_size=1 + kept_names), st.data())
    def survives(arguments, anything, data):
        nonlocal computed
        arguments = there(target, arguments)
        tensors, options = arguments[: operator.signature.num_tensors], arguments[operator.signature.num_tensors :]
        with contextlib.suppress(RuntimeError):
            if operator.signature.out.kind != "kept":
                inference(*arguments)
        with contextlib.suppress(RuntimeError):
            backward(anything[0], *tensors, *anything[1:], *options)
        with contextlib.suppress(RuntimeError):
            results = forward(*arguments)
            out, *kept = results if isinstance(results, tuple) else (results,)
            kept = [out, *kept] if operator.signature.out.kind == "kept" else kept
            grads = backward(out, *tensors, *kept, *options)
            assert (grads if isinstance(grads, torch.Tensor) else grads[0]).shape == arguments[0].shape
            computed += 1
            taken = [out, *kept]
            i = data.draw(st.integers(0, len(kept)))
            (taken[i],) = there(target, [data.draw(changed(taken[i]))])
            backward(taken[0], *tensors, *taken[1:], *options)

    survives()
    if not HERE:  # of the few calls where kernels are interpreted or emulated, all may be wrong by chance
        assert computed > examples // 20, "hardly any of the calls was right"


@pytest.mark.parametrize("name", INFERENCE_OPERATORS)
def test_inference_operators_survive_anything(name, examples):
    operator, calls = getattr(torch.ops.effattn, name).default, arguments_of_calls()[name]
    computed = 0

    @settings(max_examples=examples, deadline=None, database=None)
    @given(almost_fitting(calls))
    def survives(arguments):
        nonlocal computed
        with contextlib.suppress(RuntimeError):
            operator(*arguments)
            computed += 1

    survives()
    assert computed > examples // 20, "hardly any of the calls was right"
