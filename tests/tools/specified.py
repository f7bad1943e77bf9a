"""Calls of any operator as its specification has them: results with all gradients, the truth, and their tolerance."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import effattn
from effattn import use_backend
from effattn.ops import OPERATORS
from effattn.ops._operator import Operator
from effattn.testing import laid_out, make_arguments, moved
from effattn.tolerance import (
    CPU_ROUNDINGS,
    DRAWS,
    GPU_ROUNDINGS,
    MANY_DRAWS,
    Results,
    bounds,
    check,
    check_against,
    too_large,
)


def _representatives() -> set[str]:
    """One operator that keeps something for its backward, and one of images with lists of weights.

    Of each, the one with the fewest arguments, which is the fastest where kernels are interpreted or emulated.
    """
    keeping = [op for op in OPERATORS.values() if op.signature.kept]
    listing = [
        op for op in OPERATORS.values() if op.signature.is_of_images and any(a.is_list for a in op.signature.arguments)
    ]
    groups = [group for group in (keeping, listing) if group] or [OPERATORS.values()]
    return {min(group, key=lambda op: len(op.signature.arguments)).name for group in groups}


#: The operators that stand for all, in the short tier, where no part of a specification has its own way.
REPRESENTATIVES = _representatives()


class Expected(NamedTuple):
    """By name, "out" and the gradient of each tensor as "grad_<name>"."""

    arguments: list[Any]
    truth: Results
    allowed: dict[str, float]


def with_gradients(
    operator: Operator,
    call: Callable[..., Any],
    arguments: Sequence[Any],
    grad_dtype: torch.dtype,
    order: str = "first",
    grad_out: torch.Tensor | None = None,
) -> Results:
    """The output and all gradients by name.

    The output's gradient is ``grad_out``, or normal, of numbers that ``grad_dtype`` has, in one of ``ORDERS``.
    """
    leaves: dict[str, torch.Tensor] = {}
    taken: list[Any] = []
    for argument, given in zip(operator.signature.arguments, arguments, strict=True):
        if argument.is_option:
            taken.append(given)
            continue
        own = {name: t.detach().requires_grad_() for name, t, _ in argument.elements(given)}
        leaves |= own
        taken.append(list(own.values()) if argument.is_list else next(iter(own.values()), None))
    out = first_of(call(*taken))
    if grad_out is None:
        grad_out = laid_out(out.shape, order, operator.signature.is_of_images, grad_dtype, seed=9)
    grad_out = moved(grad_out.to(out.dtype), out.device)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out, materialize_grads=True)
    named = {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), **named}


def mapped(function: Callable[[torch.Tensor], torch.Tensor], arguments: Sequence[Any]) -> list[Any]:
    """Arguments with their tensors changed, those in lists too."""
    return [
        mapped(function, a) if isinstance(a, list) else function(a) if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]


def expected(
    operator: Operator,
    case: Mapping[str, Any],
    dtype: torch.dtype,
    order: str = "first",
    roundings: int = CPU_ROUNDINGS,
    change: Callable[[list[Any]], None] | None = None,
    grad_out: torch.Tensor | None = None,
    seed: int = 0,
) -> Expected:
    """Arguments of which no rounding decides about a gradient, with the truth and the tolerance of each result.

    ``change`` replaces arguments in the list that it is given, or writes into them; ``seed`` is the first one tried.
    """
    key = (operator.name, repr(case), dtype, order, roundings, seed)
    if change is not None or grad_out is not None or key not in _known:
        for tried in range(seed, seed + 100):
            arguments = _made(operator, case, dtype, order, tried, change)
            truth, allowed, is_decided = _bounds(operator, case, arguments, dtype, order, roundings, grad_out, DRAWS)
            if not is_decided:
                break
        else:
            raise RuntimeError(f"{operator.name}: no arguments of {case} are away from zero")
        if change is not None or grad_out is not None:
            return Expected(arguments, truth, allowed)
        if len(_known) == KNOWN:
            del _known[next(iter(_known))]
        _known[key] = tried, truth, allowed
    tried, truth, allowed = _known[key]
    return Expected(_made(operator, case, dtype, order, tried, change), truth, allowed)


#: For the same call on another instruction set.
_known: dict[Any, tuple[int, Results, dict[str, float]]] = {}
KNOWN = 64


def _made(
    operator: Operator, case: Mapping[str, Any], dtype: torch.dtype, order: str, seed: int, change: Any
) -> list[Any]:
    arguments = make_arguments(operator, case, dtype, order, seed)
    if change is not None:
        change(arguments)
    return arguments


def _bounds(
    operator: Operator,
    case: Mapping[str, Any],
    arguments: Sequence[Any],
    dtype: torch.dtype,
    order: str,
    roundings: int,
    grad_out: torch.Tensor | None,
    draws: int,
) -> tuple[Results, dict[str, float], bool]:
    wide = mapped(torch.Tensor.double, arguments)
    own_dtype = {f"grad_{a.name}" for a in operator.signature.arguments if a.is_activation} | {"out"}
    return bounds(
        lambda: with_gradients(operator, operator.plain, wide, dtype, order, grad_out),
        operator.longest_sum(case),
        roundings,
        lambda name, t: t.to(dtype if name in own_dtype else torch.float32),
        draws,
    )


def check_against_float64(
    operator: Operator,
    case: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    order: str = "first",
    backend: str = "cpu",
    device: torch.device | str = "cpu",
    change: Callable[[list[Any]], None] | None = None,
    grad_out: torch.Tensor | None = None,
    seed: int = 0,
) -> Results:
    """Compares all results of a backend with the truth, and inference with the forward of training, bit by bit.

    ``change`` and ``seed`` as in :func:`expected`.

    Returns:
        The results.
    """
    roundings = CPU_ROUNDINGS if backend == "cpu" else GPU_ROUNDINGS
    arguments, truth, allowed = expected(operator, case, dtype, order, roundings, change, grad_out, seed)
    there = mapped(lambda t: moved(t, device), arguments)
    with use_backend(backend):
        results = with_gradients(operator, operator, there, dtype, order, grad_out)
        with torch.no_grad():
            inference = first_of(operator(*there))
    assert torch.equal(inference, results["out"]), "inference differs from training"
    assert results["out"].dtype == dtype
    if too_large(results, truth, allowed):
        bounds_of_many = _bounds(operator, case, arguments, dtype, order, roundings, grad_out, MANY_DRAWS)
        check(results, truth, bounds_of_many[1])
    return results


def second_derivatives(operator: Operator, call: Callable[..., Any], arguments: Sequence[Any]) -> Results:
    """The gradient of all first gradients' sizes with respect to every tensor, flat and in one: some of them vanish."""
    leaves = mapped(lambda t: t.detach().requires_grad_(), arguments)
    flat = flattened(leaves)
    out = first_of(call(*leaves))
    grads = torch.autograd.grad(out.square().sum(), flat, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), flat)
    return {"second derivatives": torch.cat([t.flatten() for t in second])}


def gradients_through_one_another(call: Callable[..., Any], arguments: Sequence[Any], *, create_graph: bool) -> Results:
    """Gradients of leaves of which the arguments are made: each has the mean of the one before it added."""
    leaves = mapped(lambda t: t.detach().requires_grad_(), arguments)
    means = iter([0, *(t.mean() for t in flattened(leaves))])
    out = first_of(call(*mapped(lambda t: t + next(means), leaves)))
    grads = torch.autograd.grad(out.square().sum(), flattened(leaves), create_graph=create_graph)
    return {f"grad {i}": grad.detach() for i, grad in enumerate(grads)}


def named(operator: Operator, case: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a case by name."""
    names = (argument.name for argument in operator.signature.arguments)
    return dict(zip(names, make_arguments(operator, case), strict=True))


def flattened(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among arguments, those in lists too."""
    return [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]


def free_sizes(operator: Operator, case: Mapping[str, Any]) -> list[str]:
    """The names of sizes that images may have any of, whatever the weights and options are."""
    arguments = operator.signature.arguments
    fixed = {name for a in arguments if not a.is_activation for shape in a.shapes for name in shape.names}
    of_images = dict.fromkeys(name for a in arguments if a.is_activation for shape in a.shapes for name in shape.names)
    return [name for name in of_images if name not in fixed and isinstance(case[name], int)]


def of_other_sizes(operator: Operator, case: Mapping[str, Any], count: int, *, few: bool) -> list[dict[str, Any]]:
    """The case with others of these sizes, ``count`` times; of the first alone if ``few``."""
    unused = itertools.count(2)  # sizes of 0 and 1 have graphs of their own
    names = free_sizes(operator, case)[: 1 if few else None]
    return [{**case, **{name: next(unused) for name in names}} for _ in range(count)]


def of_at_least(operator: Operator, case: Mapping[str, Any], work: int) -> dict[str, Any]:
    """The case with its free sizes doubled in turn until the forward has so many FLOPs, or numbers in its arguments."""
    grown = dict(case)
    for name in itertools.cycle(free_sizes(operator, case)):
        arguments = mapped(lambda t: t.to("meta"), make_arguments(operator, grown))
        with FlopCounterMode(display=False) as counter:
            operator.plain(*arguments)
        if max(counter.get_total_flops(), sum(t.numel() for t in flattened(arguments))) >= work:
            return grown
        grown[name] *= 2
    raise ValueError(f"{operator.name}: no size of {case} is free")


def first_of(out: Any) -> torch.Tensor:
    """The output of an operator that may return what its backward takes as well."""
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result


class AsModule(torch.nn.Module):
    """An operator with its weights as parameters and its options as they are; images are the inputs."""

    def __init__(self, operator: Operator, arguments: Sequence[Any], call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        signature = operator.signature
        weights = arguments[signature.num_activations : signature.num_tensors]
        self.call = call or operator
        self.weights = torch.nn.ParameterList(flattened(weights))
        self.lengths = [len(w) if isinstance(w, list) else None for w in weights]
        self.options = arguments[signature.num_tensors :]

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        weights, grouped = list(self.weights), []
        for length in self.lengths:
            grouped.append(weights.pop(0) if length is None else [weights.pop(0) for _ in range(length)])
        return first_of(self.call(*images, *grouped, *self.options))


def publicly(operator: Operator) -> Callable[..., torch.Tensor] | None:
    """The public function, with the operator's arguments; None of an operator that only a module calls."""
    function = getattr(effattn, operator.name, None)
    if function is None:
        return None
    parameters = inspect.signature(function).parameters

    def call(*arguments: Any) -> torch.Tensor:
        given = dict(zip((a.name for a in operator.signature.arguments), arguments, strict=True))
        stems = [name.removesuffix("_size") for name in parameters if name not in given]
        given |= {f"{stem}_size": (given[f"{stem}_height"], given[f"{stem}_width"]) for stem in stems}
        taken = {name: None if _is_missing(given[name]) else given[name] for name in parameters}
        positional = [taken.pop(name) for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        out: torch.Tensor = function(*positional, **taken)
        return out

    return call


def _is_missing(argument: Any) -> bool:
    return isinstance(argument, list) and not argument


def longest_sum(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Of a model: over what a weight takes in, or over the tokens of an input."""
    fan_in = [p.numel() // p.shape[0] for p in module.parameters() if p.dim() > 1]
    return max(*fan_in, *(math.prod(t.shape[2:]) if t.dim() == 4 else t.shape[-2] for t in inputs))


def check_module(
    result: torch.Tensor | Sequence[torch.Tensor],
    stock: torch.nn.Module,
    *inputs: torch.Tensor,
    terms: int | None = None,
) -> None:
    """Compares outputs of what stands for a module, or was exported from it, with the module's in float64.

    ``terms`` of its longest sum, if it is not that of a model.
    """
    results = {str(i): t for i, t in enumerate([result] if isinstance(result, torch.Tensor) else result)}
    module, wide = copy.deepcopy(stock).double(), [t.double() for t in inputs]

    def compute() -> Results:
        with torch.no_grad():
            return dict.fromkeys(results, first_of(module(*wide)))

    check_against(compute, results, terms or longest_sum(module, *inputs))


def module_results(module: torch.nn.Module, x: torch.Tensor, grad_out: torch.Tensor) -> Results:
    """Its output, and the gradients of its input and parameters."""
    leaf = x.detach().requires_grad_()
    out = module(leaf)
    wanted = {"x": leaf, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def check_gradients(
    results: Results,
    module: torch.nn.Module,
    x: torch.Tensor,
    grad_out: torch.Tensor,
    roundings: int = GPU_ROUNDINGS,
) -> None:
    """Compares :func:`module_results` of kernels with those of the module in float64."""
    exact, wide, grad = copy.deepcopy(module).cpu().double(), x.cpu().double(), grad_out.cpu().double()
    with use_backend("reference"):
        check_against(lambda: module_results(exact, wide, grad), results, longest_sum(exact, x), roundings)
