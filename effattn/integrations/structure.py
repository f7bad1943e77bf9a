"""What a known original is made of, as declarations, and one walker that says why a module is not that.

A module is replaced only if everything it has is what the original has: its parts all the way down, their parameters
and buffers by name and shape, and the attributes that its forward reads. What is only similar computes something else.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import nn

from effattn.nn.origin import LIBRARIES, is_genuine, is_of, tried
from effattn.nn.projection import calls_in_order, is_batch_norm, is_depthwise, is_overridden, is_pointwise

#: (the whole module, a part of it, the part's name) -> why the part is not what it should be; None if it is.
Check = Callable[[Any, Any, str], str | None]
#: The whole module -> a shape; None for any.
ShapeOf = Callable[[Any], tuple[int, ...] | None]


@dataclass(frozen=True)
class Original:
    """All that a known original has.

    Args:
        parts, parameters, buffers: by name. One that is in ``optional`` may be missing.
        attributes: plain ones that must be there.
        known: plain ones that its forward may read beside these.
        check: what else must be so, after all of the above.
        example: the shape of an input that every module of this kind takes.
    """

    parts: Mapping[str, Check]
    parameters: Mapping[str, ShapeOf] = field(default_factory=dict)
    buffers: Mapping[str, ShapeOf] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    check: Callable[[Any], str | None] = lambda module: None
    example: Callable[[Any], tuple[int, ...]] | None = None

    def missing(self, module: nn.Module) -> list[str]:
        """What a module must have to be a candidate at all."""
        names = (*self.parts, *self.parameters, *self.buffers, *self.attributes)
        return [name for name in names if name not in self.optional and not hasattr(module, name)]

    def why_not(self, module: Any) -> str | None:
        """Why a module is not this original; None if it is."""
        missing = self.missing(module)
        if missing:
            return f"it has no {', '.join(missing)}"
        return (
            _why_not_by_name(module, self.parts, self.parameters, self.buffers)
            or _why_not_by_shape(module, module, {**self.parameters, **self.buffers}, "")
            or _first(check(module, module._modules.get(name), name) for name, check in self.parts.items())
            or self.check(module)
            or _why_not_its_parts(module)
            or _why_not_its_forward(module, {*self.parts, *self.attributes, *self.known})
        )


def _first(reasons: Iterator[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


Names = Collection[str]


def _why_not_by_name(module: nn.Module, parts: Names = (), parameters: Names = (), buffers: Names = ()) -> str | None:
    """Where something is there that the original has not, or is there as something else."""
    registered = {**module._modules, **module._parameters, **module._buffers}
    for kind, own, known in (
        ("part", module._modules, parts),
        ("parameter", module._parameters, parameters),
        ("buffer", module._buffers, buffers),
    ):
        for name, value in own.items():
            if value is not None and name not in known:
                return f"unknown {kind} {name}"
        for name in known:
            if name not in registered and getattr(module, name, None) is not None:
                return f"its {name} is a plain attribute, not a {kind}"
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor | nn.Module) and name != "ab":  # the official bias, gathered
            return f"unknown attribute {name}, a {type(value).__name__}"
        if name != "forward" and inspect.isroutine(getattr(type(module), name, None)):
            return f"its {name} was replaced on the instance"
    return None


def _why_not_by_shape(root: Any, module: nn.Module, shapes: Mapping[str, ShapeOf], prefix: str) -> str | None:
    for name, shape_of in shapes.items():
        value, expected = getattr(module, name, None), shape_of(root)
        if value is not None and expected is not None and tuple(value.shape) != expected:
            return f"{prefix}{name} of shape {tuple(value.shape)}, expected {expected}"
    return None


def _why_not_its_parts(module: nn.Module) -> str | None:
    """Where parts have hooks they are called one by one, and nothing would be gained."""
    hooked = [name for name, part in module.named_modules() if name and is_overridden(part)]
    return f"its parts have hooks or forwards of their own: {', '.join(hooked)}" if hooked else None


def _why_not_its_forward(module: nn.Module, known: set[str]) -> str | None:
    """Where the code of forward reads attributes that the original has not; rewriting it otherwise does no harm."""
    cls = type(module)
    for name in sorted(_read_by(cls, "forward", set()) - known):
        of_class = getattr(cls, name, None)
        if name in vars(module) or (of_class is not None and not callable(of_class) and not hasattr(nn.Module, name)):
            return f"its forward reads {name}, which the original has not"
    return None


def _read_by(cls: type, name: str, seen: set[str]) -> set[str]:
    """Names of attributes and globals that a method reads, itself and through methods of the class that it calls."""
    method = getattr(cls, name, None)
    code = getattr(inspect.unwrap(getattr(method, "fget", method)), "__code__", None)  # type: ignore[arg-type]
    if code is None or (name != "forward" and hasattr(nn.Module, name)):
        return {name}
    if name in seen:
        return set()
    seen.add(name)
    names = {used for nested in _codes(code) for used in nested.co_names}
    return {used for other in names for used in _read_by(cls, other, seen)}


def _is_known_code(module: nn.Module) -> bool:
    """Whether every method of a module, and the forward of every part, is one of torch or of a known library."""
    for base in type(module).__mro__:
        if base is nn.Module:
            break
        for value in vars(base).values():
            method = getattr(value, "fget", getattr(value, "__func__", value))
            if inspect.isfunction(method) and not is_of(method, "torch", *LIBRARIES):
                return False
    parts = (type(part) for part in module.modules())
    return all(is_of(cls.forward, "torch") or is_genuine(cls) for cls in parts)


# Relative error in float64: a thousand units in the last place of float32, in which originals may take their sums.
_SAME = 2.0**-13


def why_not_its_answers(module: Any, replacement: Any, original: Original) -> str | None:
    """Where code that is no library's computes something else with the same parts.

    A copy with random weights, in float64 on the CPU, is asked for one small input, in evaluation and in training. What
    cannot be copied so (weights on the meta device, subclasses of tensors) is taken by its structure alone.
    """
    tensors = [*module.parameters(), *module.buffers()]
    plain = all(type(t) in (nn.Parameter, torch.Tensor) and not t.is_meta for t in tensors)
    if original.example is None or not plain or _is_known_code(module):
        return None
    wanted = list(inspect.signature(replacement.forward).parameters)
    given = list(inspect.signature(type(module).forward).parameters)
    more = [name for name in given[2:] if name not in wanted]  # behind self and the input
    if more:
        return f"its forward takes {', '.join(more)}, which the original's does not"
    unknown = {type(part) for part in module.modules()} - tried
    tried.update(unknown)  # or the replacement would call them, and nothing would be compared
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            reason = _first(_why_not_same(module, replacement, original, training) for training in (False, True))
    except Exception as error:
        reason = f"its forward could not be tried ({type(error).__name__}: {error})"
    if reason is not None:
        tried.difference_update(unknown)
    return reason


def _why_not_same(module: Any, replacement: Any, original: Original, training: bool) -> str | None:
    assert original.example is not None
    # Biases that it has gathered may be part of a graph, which cannot be copied; train() gathers them again.
    gathered = (vars(module).get(name) for name in original.known)
    twin = copy.deepcopy(module, {id(t): None for t in gathered if isinstance(t, torch.Tensor)}).to(
        "cpu", torch.float64
    )
    generator = randomize(twin)
    twin.train(training)
    x = torch.rand(2, *original.example(module)[1:], dtype=torch.float64, device="cpu", generator=generator)
    before = set(vars(twin))
    theirs = type(module).forward(twin, x)
    kept = sorted(set(vars(twin)) - before - set(original.known))
    if kept:
        return f"its forward keeps {', '.join(kept)}"
    twin.__class__ = replacement
    ours = replacement.forward(twin, x)
    return (
        None
        if is_same(ours, theirs)
        else f"its forward computes something else in {'training' if training else 'evaluation'}"
    )


def randomize(module: nn.Module) -> torch.Generator:
    """Random weights, and the generator that made them."""
    generator = torch.Generator().manual_seed(0)
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if t.is_floating_point():
            t.uniform_(*((0.5, 1.5) if name.endswith("running_var") else (-0.5, 0.5)), generator=generator)
    return generator


def is_same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two answers in float64 differ by no more than the order of their sums."""
    return theirs.shape == ours.shape and bool((ours - theirs).norm() <= _SAME * theirs.norm())


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


# --- what parts are declared with ------------------------------------------------------------------------------


# Parameters of torch's own classes.
_OWN = {nn.Linear: ("weight", "bias"), nn.Conv2d: ("weight", "bias")}


def only(*classes: type[nn.Module]) -> Check:
    """A part of exactly one of these classes."""

    def check(root: Any, part: Any, name: str) -> str | None:
        if type(part) in classes:
            return _prefixed(name, _why_not_by_name(part, (), _OWN.get(type(part), ())))
        return f"{name} is {type(part).__name__}, not {' or '.join(cls.__name__ for cls in classes)}"

    return check


def any_module(root: Any, part: Any, name: str) -> str | None:
    """A part that is called, but where it is one that the operators know."""
    return None if isinstance(part, nn.Module) else f"{name} is no module"


def linear(inputs: Callable[[Any], int | None], outputs: Callable[[Any], int | None]) -> Check:
    """A linear layer with a bias, of so many inputs and outputs; None for any number."""

    def check(root: Any, part: Any, name: str) -> str | None:
        if type(part) is not nn.Linear:
            return f"{name} is {type(part).__name__}, not Linear"
        reason = _prefixed(name, _why_not_by_name(part, (), ("weight", "bias"), ()))
        if reason is not None or part.bias is None:
            return reason or f"{name} has no bias"
        return _why_not_sizes(name, part.weight, inputs(root), outputs(root))

    return check


def _why_not_sizes(name: str, weight: torch.Tensor, inputs: int | None, outputs: int | None) -> str | None:
    expected = (weight.shape[0] if outputs is None else outputs, weight.shape[1] if inputs is None else inputs)
    if tuple(weight.shape[:2]) == expected:
        return None
    return f"{name} has a weight of shape {tuple(weight.shape)}, expected {(*expected, *weight.shape[2:])}"


@dataclass(frozen=True)
class Pointwise:
    """A 1x1 convolution, of so many inputs and outputs; None for any number."""

    inputs: int | None = None
    outputs: int | None = None
    groups: int = 1

    def why_not(self, conv: nn.Conv2d, name: str) -> str | None:
        if not is_pointwise(conv, self.groups) or conv.padding_mode != "zeros":
            return f"{name} is not a 1x1 convolution" + (f" in {self.groups} groups" if self.groups > 1 else "")
        inputs = None if self.inputs is None else self.inputs // self.groups
        return _why_not_sizes(name, conv.weight, inputs, self.outputs)


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution of an odd kernel (None for any) that keeps the size, or divides it."""

    channels: int
    stride: int = 1
    kernel: int | None = None

    def why_not(self, conv: nn.Conv2d, name: str) -> str | None:
        does = "keeps the size" if self.stride == 1 else f"has a stride of {self.stride}"
        if not is_depthwise(conv, self.stride):
            return f"{name} is not a depthwise convolution of an odd kernel that {does}"
        if self.kernel is not None and conv.kernel_size[0] != self.kernel:
            return f"{name} has a kernel of {conv.kernel_size}, expected {(self.kernel, self.kernel)}"
        return _why_not_sizes(name, conv.weight, 1, self.channels)


Form = Callable[[Any], Pointwise | Depthwise]


def convolution(form: Form) -> Check:
    """A plain convolution of a form that depends on the whole module."""

    def check(root: Any, part: Any, name: str) -> str | None:
        if type(part) is not nn.Conv2d:
            return f"{name} is {type(part).__name__}, not Conv2d"
        return _prefixed(name, _why_not_by_name(part, (), ("weight", "bias"), ())) or form(root).why_not(part, name)

    return check


def conv_norm(form: Form, *, in_front: Callable[[Any], int] = lambda root: 0) -> Check:
    """A convolution with a BatchNorm behind it, or with that folded in; an activation may stand in front of both."""

    def check(root: Any, part: Any, name: str) -> str | None:
        if type(part) is nn.Conv2d and in_front(root) == 0:
            return convolution(form)(root, part, name)
        if not isinstance(part, nn.Module) or (not is_overridden(part) and not calls_in_order(part)):
            return f"{name} is {type(part).__name__}, not a convolution and a BatchNorm in order"
        names, parts = list(part._modules), list(part._modules.values())[in_front(root) :]
        if not parts or len(parts) > 2 or None in part._modules.values():
            return f"{name} has parts {', '.join(names)}, expected a convolution with a BatchNorm"
        path = [f"{name}.{n}" for n in names[in_front(root) :]]
        reason = _prefixed(name, _why_not_by_name(part, names)) or convolution(form)(root, parts[0], path[0])
        if reason is not None or len(parts) == 1:
            return reason
        return _why_not_norm(parts[1], path[1], parts[0].out_channels)

    return check


_OF_A_NORM = ("weight", "bias", "running_mean", "running_var")


def _why_not_norm(norm: nn.Module, name: str, channels: int) -> str | None:
    if is_overridden(norm):
        return None  # a reason of its own
    if not is_batch_norm(norm):
        return f"{name} is {type(norm).__name__}, not a BatchNorm"
    known = (*_OF_A_NORM, "num_batches_tracked")
    own = [*norm._parameters, *norm._buffers]
    unknown = _first(f"{name}: unknown tensor {n}" for n in own if n not in known and getattr(norm, n) is not None)
    return unknown or _why_not_by_shape(None, norm, dict.fromkeys(_OF_A_NORM, lambda _: (channels,)), f"{name}.")


def each(check: Check, length: Callable[[Any], int] | None = None) -> Check:
    """A list of parts, as long as ``length`` says, or of any length."""

    def check_all(root: Any, part: Any, name: str) -> str | None:
        if type(part) is not nn.ModuleList:
            return f"{name} is {type(part).__name__}, not ModuleList"
        if length is not None and len(part) != length(root):
            return f"{name} has {len(part)} parts, expected {length(root)}"
        reason = _prefixed(name, _why_not_by_name(part, part._modules))
        return reason or _first(check(root, item, f"{name}.{i}") for i, item in part._modules.items())

    return check_all


def in_order(*checks: Check) -> Check:
    """Parts that are called one after the other."""

    def check_all(root: Any, part: Any, name: str) -> str | None:
        if not isinstance(part, nn.Module) or (not is_overridden(part) and not calls_in_order(part)):
            return f"{name} is {type(part).__name__}, not Sequential"
        if len(part._modules) != len(checks):
            return f"{name} has {len(part._modules)} parts, expected {len(checks)}"
        reason = _prefixed(name, _why_not_by_name(part, part._modules))
        pairs = zip(checks, part._modules.items(), strict=True)
        return reason or _first(check(root, item, f"{name}.{key}") for check, (key, item) in pairs)

    return check_all


def made_of(classes: tuple[str, ...], parts: Mapping[str, Check], optional: tuple[str, ...] = ()) -> Check:
    """A module of a class of one of these names, with these parts."""
    original = Original(parts, optional=optional)

    def check_all(root: Any, part: Any, name: str) -> str | None:
        if type(part).__name__ not in classes:
            return f"{name} is {type(part).__name__}, not {' or '.join(classes)}"
        missing = original.missing(part)
        if missing:
            return f"{name} has no {', '.join(missing)}"
        reason = _prefixed(name, _why_not_by_name(part, parts) or _why_not_its_forward(part, set(parts)))
        items = ((check, part._modules.get(key), f"{name}.{key}") for key, check in parts.items())
        return reason or _first(check(root, item, path) for check, item, path in items)

    return check_all


def maybe(check: Check) -> Check:
    """A part that may be None."""
    return lambda root, part, name: None if part is None else check(root, part, name)


def _prefixed(name: str, reason: str | None) -> str | None:
    return None if reason is None else f"{name}: {reason}"


def convolution_in(part: Any) -> Any:
    """The convolution of a part, wherever in it; what it says of sizes is checked against all others."""
    found = (module for module in part.modules() if isinstance(module, nn.Conv2d))
    return next(found, nn.Conv2d(1, 1, 1, device="meta"))


def why_not_this_class(module: Any) -> str | None:
    """Why nothing of this class can be replaced, whatever it is made of."""
    cls = type(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if sum(base.__name__ == cls.__name__ for base in cls.__mro__) > 1:
        return "its class derives from another of that name"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if isinstance(module, nn.Module) and cls.__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    return None
