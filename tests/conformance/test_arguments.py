"""Wrong arguments, made of every operator's signature: a typed error that names the argument, the same words from the
compiled operators, no crash whatever they are called with."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specified import mapped
from torch.autograd import forward_ad
from wrong_calls import WRONG_CALLS, one_larger

from effattn import use_backend
from effattn.ops import INFERENCE_OPERATORS, OPERATORS
from effattn.testing import make_arguments

pytestmark = pytest.mark.arguments


@pytest.mark.parametrize(("operator", "arguments", "error", "name", "text"), WRONG_CALLS)
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
    # A size may be said to be wrong of the other argument that has it.
    assert argument == name or (error is ValueError and argument in {a.name for a in operator.signature.arguments})
    assert text in message or argument != name


def there(target, arguments):
    """On the target's device, but for what is wrong because of where or how it lies."""
    return mapped(
        lambda t: t if t.device.type == "meta" or t.layout != torch.strided else t.to(target.device), arguments
    )


@pytest.mark.each_value
@pytest.mark.parametrize(("operator", "arguments", "error", "name", "text"), WRONG_CALLS)
def test_the_torch_operators_refuse_in_the_same_words(target, operator, arguments, error, name, text):
    expected = str(operator.signature.error(arguments, weights="float32"))
    kinds = ("_forward",) if operator.signature.out.kind == "kept" else ("", "_forward")
    for kind in kinds:
        with pytest.raises(RuntimeError) as raised:
            getattr(target.ops, operator.name + kind)(*there(target, arguments))
        if error is ValueError and "device" not in expected:
            assert str(raised.value).endswith(f"{operator.name}: {expected}")


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


@pytest.mark.parametrize("name", OPERATORS)
def test_the_backward_checks_its_own(name):
    operator = OPERATORS[name]
    arguments = make_arguments(operator, operator.cases[0])
    tensors, options = arguments[: operator.signature.tensors], arguments[operator.signature.tensors :]
    results = getattr(torch.ops.effattn, f"{name}_forward")(*arguments)
    out, *kept = results if isinstance(results, tuple) else (results,)
    kept = [out, *kept] if operator.signature.out.kind == "kept" else kept
    backward = getattr(torch.ops.effattn, f"{name}_backward")
    backward(out, *tensors, *kept, *options)
    names = ["grad_out", *(returned.name for returned in operator.signature.backward_takes)]
    for i, (what, t) in enumerate(zip(names, [out, *kept], strict=True)):
        wrong_ones = {
            f"{what}: expected shape": one_larger(t, t.dim() - 1),
            f"{what}: expected": t.half(),
            f"{what}: expected the device of": t.to("meta"),
            f"{what}: expected a contiguous tensor": t.mT.contiguous().mT,
        }
        if what in ("grad_out", "out"):
            del wrong_ones[f"{what}: expected a contiguous tensor"]
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
def almost_fitting(draw, operator):
    """Arguments of one of the operator's cases, a few of them replaced by anything of their kind."""
    case = draw(st.sampled_from(operator.cases))
    arguments = make_arguments(operator, case, draw(DTYPES.filter(lambda dtype: dtype.is_floating_point)))
    for i in draw(st.lists(st.integers(0, len(arguments) - 1), max_size=3)):
        argument = operator.signature.arguments[i]
        if argument.kind == "integer":
            arguments[i] = draw(st.sampled_from([-1, 0, 1, 2, 7, 2**31, 2**62, -(2**63)]))
        elif argument.kind == "number":
            arguments[i] = draw(st.floats())
        elif argument.kind == "numbers":
            arguments[i] = draw(st.lists(st.floats(), max_size=5))
        elif argument.is_list:
            arguments[i] = draw(st.one_of(st.none(), st.lists(any_tensor(), max_size=5)))
        else:
            arguments[i] = draw(any_tensor())
    return arguments


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_survive_anything(name, examples):
    """They compute or raise; nothing crashes the process or hangs."""
    operator = OPERATORS[name]
    kept_names = len(operator.signature.backward_takes)

    @settings(max_examples=examples, deadline=None, database=None)
    @given(almost_fitting(operator), any_tensor(), st.lists(any_tensor(), min_size=kept_names, max_size=kept_names))
    def survives(arguments, grad_out, kept):
        tensors, options = arguments[: operator.signature.tensors], arguments[operator.signature.tensors :]
        with contextlib.suppress(RuntimeError):
            if operator.signature.out.kind != "kept":
                getattr(torch.ops.effattn, name)(*arguments)
        with contextlib.suppress(RuntimeError):
            getattr(torch.ops.effattn, f"{name}_backward")(grad_out, *tensors, *kept, *options)
        with contextlib.suppress(RuntimeError):
            results = getattr(torch.ops.effattn, f"{name}_forward")(*arguments)
            out, *rest = results if isinstance(results, tuple) else (results,)
            rest = [out, *rest] if operator.signature.out.kind == "kept" else rest
            grads = getattr(torch.ops.effattn, f"{name}_backward")(out, *tensors, *rest, *options)
            assert (grads if isinstance(grads, torch.Tensor) else grads[0]).shape == arguments[0].shape

    survives()


def anything(kind):
    """Of a type of a schema."""
    numbers = {"int": st.sampled_from([-1, 0, 1, 2, 7, 2**31, 2**62, -(2**63)]), "float": st.floats()}
    if kind.startswith("Optional["):
        return st.one_of(st.none(), anything(kind[len("Optional[") : -1]))
    if kind.startswith("List["):
        return st.lists(anything(kind[len("List[") : -1]), max_size=5)
    return any_tensor() if kind == "Tensor" else numbers[kind]


@pytest.mark.parametrize("name", INFERENCE_OPERATORS)
def test_inference_operators_survive_anything(name, examples):
    operator = getattr(torch.ops.effattn, name).default

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.tuples(*(anything(str(argument.type)) for argument in operator._schema.arguments)))
    def survives(arguments):
        with contextlib.suppress(RuntimeError):
            operator(*arguments)

    survives()
