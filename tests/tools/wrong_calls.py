"""Calls of every operator with one wrong argument, made of its signature."""

from __future__ import annotations

import pytest
import torch

from effattn.ops import OPERATORS
from effattn.testing import make_arguments


def replaced(arguments, i, element, value):
    changed = [list(a) if isinstance(a, list) else a for a in arguments]
    if element is None:
        changed[i] = value
    else:
        changed[i][element] = value
    return changed


def one_larger(t, dim):
    return (
        torch.cat([t, t.narrow(dim, 0, 1)], dim) if t.shape[dim] else t.new_ones(*t.shape[:dim], 1, *t.shape[dim + 1 :])
    )


def wrong_tensors(operator, arguments, i):
    """(what, the argument's element, value, error, its text) for each way in which a tensor may be wrong."""
    signature, argument = operator.signature, operator.signature.arguments[i]
    used = [name for a in signature.arguments for shape in a.shapes for name in shape.names]
    for at, (name, t, shape) in enumerate(argument.elements(arguments[i])):
        element = at if argument.is_list else None
        yield f"{name} list", element, [1.0], TypeError, "expected a torch.Tensor, got list"
        if element is not None or not argument.may_be_empty:
            yield f"{name} None", element, None, TypeError, "expected a torch.Tensor, got NoneType"
        yield f"{name} integer", element, t.long(), TypeError, "got torch.int64"
        yield f"{name} sparse", element, t.to_sparse(), TypeError, "expected a dense (strided) tensor, got layout"
        if i > 0:
            of = signature.arguments[0].name
            yield f"{name} dtype", element, t.half(), TypeError, f"{of}, torch.float32"
            yield f"{name} device", element, t.to("meta"), ValueError, f"expected the device of {of}, cpu, got meta"
        fewer = t.reshape(-1)[0] if shape.has_leading else t[0]
        yield (
            f"{name} rank",
            element,
            fewer,
            ValueError,
            f"dimension{'s' * (len(shape.dims) != 1)} {shape.text}, got shape",
        )
        for d, dim in enumerate(shape.dims, start=t.dim() - len(shape.dims)):
            if len(dim.names) == 1 and used.count(dim.names[0]) == 1 and dim.text == dim.names[0]:
                continue  # any size is right
            text = f"expected an odd {dim.text}" if dim.needs == "odd" else "expected"
            yield f"{name} size {d}", element, one_larger(t, d), ValueError, text
        if shape.has_leading and i > 0:
            yield f"{name} leading sizes", element, t.expand(2, *t.shape), ValueError, "expected shape (..."


def wrong_lists(argument, given):
    """(what, value, error, its text) for each way in which a list may be wrong."""
    name = argument.name
    yield f"{name} tensor", given[0], TypeError, f"{name}: expected a sequence of tensors, got Tensor"
    if len(given) > 1:
        yield f"{name} short", given[:-1], ValueError, "expected"


def wrong_options(argument, given):
    name = argument.name
    if argument.kind == "integer":
        yield f"{name} float", 1.5, TypeError, f"{name}: expected an int, got float"
        yield f"{name} text", "1", TypeError, f"{name}: expected an int, got str"
        too_small = int(argument.minimum) - 1
        yield f"{name} small", too_small, ValueError, f"{name}: expected an int >= {argument.minimum:.0f}"
        if argument.maximum < float("inf"):
            yield f"{name} large", int(argument.maximum) + 1, ValueError, f"and <= {argument.maximum:.0f}, got"
    elif argument.kind == "numbers":
        yield f"{name} number", 1.0, TypeError, f"{name}: expected a sequence of numbers, got float"
        yield f"{name} element", [*given[:-1], "1"], TypeError, f"{name}[{len(given) - 1}]: expected a number, got str"
        yield f"{name} nan", [*given[:-1], float("nan")], ValueError, "expected a finite float32"
        yield f"{name} short", given[:-1], ValueError, f"{name}: expected"
    elif argument.kind == "number":
        yield f"{name} None", None, TypeError, f"{name}: expected a number, got NoneType"
        yield f"{name} text", "1", TypeError, f"{name}: expected a number, got str"
        negative = (-1.0, -2.5e-7, -123456.75, -1e16) if argument.minimum == 0 else ()
        for number in (float("nan"), float("inf"), -float("inf"), 3.5e38, -1e39, *negative):
            yield f"{name} {number}", number, ValueError, f"{name}: expected a finite float32"


def converted_by_torch(argument, _):
    """Options that torch makes numbers of before an operator sees them."""
    kind = {"integer": "an int", "number": "a number"}.get(argument.kind)
    if kind is not None:
        for value in (True, torch.tensor(1), torch.tensor(1.5)):
            got = type(value).__name__
            yield f"{argument.name} {value}", value, TypeError, f"{argument.name}: expected {kind}, got {got}"


def wrong_calls(of_options):
    """Of every operator, with tensors, lists and, as ``of_options`` yields them, options that are wrong."""
    calls = []
    for operator in OPERATORS.values():
        arguments = make_arguments(operator, operator.cases[0])
        for i, argument in enumerate(operator.signature.arguments):
            found = []
            if argument.is_option:
                found += [(w, None, v, e, t) for w, v, e, t in of_options(argument, arguments[i])]
            else:
                found += wrong_tensors(operator, arguments, i)
            if argument.is_list and not argument.is_option:
                found += [(w, None, v, e, t) for w, v, e, t in wrong_lists(argument, arguments[i])]
            for what, element, value, error, text in found:
                call = operator, replaced(arguments, i, element, value), error, argument.name, text
                calls.append(pytest.param(*call, id=f"{operator.name}-{what}"))
    return calls


WRONG_CALLS = wrong_calls(wrong_options)
#: Calls of functions alone: a torch operator never sees what is wrong.
CONVERTED_BY_TORCH = [
    call for call in wrong_calls(converted_by_torch) if call.id not in {wrong.id for wrong in WRONG_CALLS}
]
