"""An operator's specification, and its registration with torch: fake kernels, autograd, ONNX, FLOPs.

Of a differentiable operator there is ``effattn::<name>`` for inference, ``effattn::<name>_forward``, which computes
the same, may return what the backward needs beside the output, and carries the autograd formula, because one in Python
triples the cost of a call that needs none, and ``effattn::<name>_backward``. Triton's kernels stand behind the same
three names in a namespace of their own. Operators take weights in float32 only, whatever the activations are: they are
small, and under autocast they are float32 already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from effattn import _library, registry
from effattn._tracing import becomes_node, untraced
from effattn.backends import Backend, is_small_call, triton
from effattn.backends._memory import empty_image_in_order_of
from effattn.ops import _recording
from effattn.ops._glue import Argument, Glue, flat, mapped
from effattn.ops._nodes import record_operator
from effattn.ops._signature import Signature
from effattn.ops._triton_operators import TritonOperators

# Looked up once: a call on one token is made in a few microseconds.
_is_transforming, _is_tracing = torch._C._are_functorch_transforms_active, torch._C._is_tracing
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by autograd.grad(is_grads_batched=True)
#: The types of options that torch takes for what they are; of bools and tensors it makes numbers, of those ints.
_OPTIONS = frozenset((int, float, list))
#: Plain types of tensors: any other (fake, functional, a subclass) takes the slow path.
_EAGER = (torch.Tensor, torch.nn.Parameter)
#: Every differentiable operator, by name.
OPERATORS: dict[str, Operator] = {}
#: Those for the inference of a module alone, by name.
INFERENCE_OPERATORS: dict[str, InferenceOperator] = {}


class Fused(NamedTuple):
    """The torch operators of a backend with kernels: ``forward`` has the autograd formula, ``inference`` has none."""

    inference: Callable[..., torch.Tensor]
    forward: Callable[..., Any]


class Operator:
    """The specification of a differentiable operator.

    Args:
        name: of the torch operators, and of the files of kernels.
        signature: what it takes and returns (:mod:`effattn.ops._signature`).
        plain: the equation in differentiable torch operations, of all arguments; returns the output.
        limited_sizes: of all arguments, the sizes that backends may have a limit for.
        limits: of each of these, the name of its limit.
        cases: of calls for tests, the size of every name (of a name that differs from element to element of a list, one
            each) and the options. ``make_arguments`` of :mod:`effattn.testing` makes the tensors.
        longest_sum: of a case, the number of terms in the longest sum behind any element of any result, of which the
            tolerance is made (:mod:`effattn.tolerance`).
        dtypes: of activations, which backends with kernels take; ``plain`` takes float64 too.
        plain_backward: (grad_out, *arguments) -> gradients of the tensors, in operations that can be differentiated
            again; by default autograd's of ``plain``.
    """

    def __init__(
        self,
        name: str,
        signature: str,
        plain: Callable[..., Any],
        limited_sizes: Callable[..., Sequence[int]] = lambda *_: (),
        *,
        limits: Sequence[str] = (),
        cases: Sequence[Mapping[str, Any]],
        longest_sum: Callable[[Mapping[str, Any]], int],
        dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
        plain_backward: Callable[..., Sequence[Argument]] | None = None,
    ) -> None:
        self.name = name
        self.signature = Signature(signature)
        self.plain = plain
        self.limited_sizes = limited_sizes
        self.cases = tuple(cases)
        self.longest_sum = longest_sum
        self.limits = tuple(limits)
        self.dtypes = tuple(dtypes)
        registry.FACTS[name] = registry.Facts(self.dtypes, self.limits)
        self.plain_backward = plain_backward or self._autograd_of_plain
        self.glue = Glue(name, self.signature)
        self._returns_all = self.signature.out.kind == "kept"
        self._num_activations, self._num_tensors = self.signature.num_activations, self.signature.num_tensors
        #: By backend.
        self._fused: dict[str, Fused] = {}
        OPERATORS[name] = self
        if name in triton.LAUNCHERS:
            TritonOperators(self.glue, self.named_sizes, triton.LAUNCHERS[name])
            self._register("triton", triton.NAMESPACE)
        if _library.error is None:
            self._register("cpu", "effattn")
            self._fused["cuda"] = self._fused["cpu"]

    def __call__(self, *arguments: Any) -> Any:
        """Calls the chosen backend; TypeError or ValueError if an argument is wrong."""
        try:
            first, is_tracing = arguments[0], False
            is_transformed = _is_transforming() or forward_ad._current_level >= 0
            if is_transformed or type(first) not in _EAGER or torch.compiler.is_compiling() or _is_tracing():
                if becomes_node(self.name, *arguments[: self._num_activations]):
                    self._check(arguments)
                    return record_operator(self.name, self.signature, arguments, self.glue.check(arguments)[0])
                fused, arguments, is_tracing = self._chosen(arguments)
            else:  # _chosen, inlined for a call whose kernel is done in a microsecond
                for option in arguments[self._num_tensors :]:
                    if type(option) not in _OPTIONS:
                        self._check(arguments)
                        break
                is_small = not first.is_cpu and is_small_call(arguments[: self._num_activations])
                sizes = self.limited_sizes(*arguments)
                backend = registry.choose(self.name, first.device, first.dtype, sizes, is_small)
                fused = self._fused.get(backend.name) or self._fused_of(backend, arguments)
            # torch.func and forward mode differentiate through plain operations, never through a kernel.
            if fused is None or is_transformed:
                if fused is not None:
                    self._check(arguments)
                return self.plain(*arguments)
            if first.dtype != torch.float32:
                before, behind = self._num_activations, self._num_tensors
                weights = (mapped(_to_float, a, first.dtype) for a in arguments[before:behind])
                arguments = (*arguments[:before], *weights, *arguments[behind:])
            # A trace holds what can be differentiated, however it is made: torch checks it by one without gradients.
            if is_tracing or (torch.is_grad_enabled() and _require_grad(arguments[: self._num_tensors])):
                out = fused.forward(*arguments)
                return out if self._returns_all or isinstance(out, torch.Tensor) else out[0]
            return fused.inference(*arguments)
        except Exception:
            # csrc and _triton_operators.py check arguments, so a valid call is not checked in Python as well.
            if not torch.compiler.is_compiling():
                self._raise_if_wrong(arguments)
            raise

    def named_sizes(self, *arguments: Any) -> list[tuple[str, int]]:
        """The sizes of a call that backends may have a limit for, each with the limit's name."""
        return list(zip(self.limits, self.limited_sizes(*arguments), strict=True))

    def _raise_if_wrong(self, arguments: Sequence[Any]) -> None:
        if torch.jit.is_tracing():
            with untraced():
                # Sizes that a trace made tensors of are numbers again.
                numbers = (a.item() if isinstance(a, torch.Tensor) and a.dim() == 0 else a for a in arguments)
                error = self.signature.error(tuple(numbers))
        else:
            error = self.signature.error(arguments)
        if error is not None:
            raise error from None

    def _chosen(self, arguments: tuple[Any, ...]) -> tuple[Fused | None, tuple[Any, ...], bool]:
        """What computes, its arguments, and whether torch.jit.trace records it; in a graph sizes may be no numbers."""
        first, is_compiling = arguments[0], torch.compiler.is_compiling()
        if not is_compiling and _is_tracing():
            with untraced():
                options = arguments[self._num_tensors :]
                numbers = (o.item() if isinstance(o, torch.Tensor) else o for o in options)  # sizes, traced
                arguments = (*arguments[: self._num_tensors], *numbers)
                backend = registry.find(self.name, first.device, first.dtype, self.limited_sizes(*arguments))
                return self._fused_of(backend, arguments), arguments, True
        if not is_compiling and any(type(option) not in _OPTIONS for option in arguments[self._num_tensors :]):
            self._check(arguments)
        sizes = self.limited_sizes(*arguments)
        find = registry.find if is_compiling or not all(type(size) is int for size in sizes) else registry.choose
        is_small = is_small_call(arguments[: self._num_activations])
        backend = find(self.name, first.device, first.dtype, sizes, is_small=is_small)
        return self._fused_of(backend, arguments), arguments, False

    def _fused_of(self, backend: Backend, arguments: Sequence[Any]) -> Fused | None:
        if backend.namespace is not None:
            return self._fused[backend.name]
        self._check(arguments)
        return None

    def _check(self, arguments: Sequence[Any]) -> None:
        """In front of what complains of nothing: plain operations would broadcast."""
        error = self.signature.error(arguments)
        if error is not None:
            raise error

    # --- registration -------------------------------------------------------------------------------------------

    def _register(self, backend: str, namespace: str) -> None:
        """Registers fake kernels, the autograd formula, the ONNX translation and FLOPs."""
        self.glue.register_fakes(namespace)
        operators, name = getattr(torch.ops, namespace), f"{namespace}::{self.name}"
        forward = getattr(operators, f"{self.name}_forward").default
        inference = forward if self._returns_all else getattr(operators, self.name).default
        self._fused[backend] = Fused(inference, forward)
        if not self._returns_all:
            _recording.register(name, self.plain)
        formula = partial(self._backward, getattr(operators, f"{self.name}_backward").default)
        torch.library.register_autograd(f"{name}_forward", formula, setup_context=self._setup_context)
        _recording.register(f"{name}_forward", self.plain, outputs=2 if self.signature.kept else 1)
        _recording.register_backward(f"{name}_backward", self.plain, self.glue.split_backward)

    # --- autograd -----------------------------------------------------------------------------------------------

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inputs = self.signature.without_none(inputs)
        arguments, ctx.options = inputs[: self._num_tensors], inputs[self._num_tensors :]
        # A list by its length, a tensor by None.
        ctx.lengths = [None if isinstance(a, torch.Tensor) else len(a) for a in arguments]
        kept: tuple[torch.Tensor, ...] = ()
        if self.signature.kept:
            kept = output if self._returns_all else output[1:]
            ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat(arguments), *kept)

    def _backward(
        self, backward: Callable[..., Any], ctx: Any, grad_out: torch.Tensor | None, *_: None
    ) -> tuple[Any, ...]:
        no_options = (None for _ in ctx.options)
        if grad_out is None:
            return *(None if n is None else [None] * n for n in ctx.lengths), *no_options
        arguments, kept = _grouped(ctx.saved_tensors, ctx.lengths)
        # create_graph=True, or vmap of a backward: kernels are neither differentiated again nor take a batch of calls.
        if torch.is_grad_enabled() or _is_transforming() or _is_batched(grad_out):
            return *self.plain_backward(grad_out, *arguments, *ctx.options), *no_options
        return *backward(grad_out, *arguments, *kept, *ctx.options), *no_options

    def _autograd_of_plain(self, grad_out: torch.Tensor, *arguments: Any) -> list[Argument]:
        create_graph, tensors = torch.is_grad_enabled(), flat(arguments[: self._num_tensors])
        lengths = [None if isinstance(a, torch.Tensor) else len(a) for a in arguments[: self._num_tensors]]
        with torch.enable_grad():
            # Of arguments that are made of one another, the gradient of one must not go on through another: aliases.
            tensors = [t.view_as(t) for t in tensors]
            out = self.plain(*_grouped(tensors, lengths)[0], *arguments[self._num_tensors :])
        wanted = [t for t in tensors if t.requires_grad]
        out = out[0] if self._returns_all else out
        # Of an empty image, no weight is used.
        options = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
        grads = iter(torch.autograd.grad(out, wanted, grad_out, **options))
        return _grouped([next(grads) if t.requires_grad else None for t in tensors], lengths)[0]


class InferenceOperator:
    """An operator ``effattn::<name>`` of a module's inference: it has no autograd formula.

    Args:
        name: of the torch operator.
        plain: the same in torch operations.
        shape: of all arguments, the output's; its dimensions lie in memory like those of the first argument.
        signature: in place of ``shape``, where arguments are not packed.
    """

    def __init__(
        self,
        name: str,
        plain: Callable[..., torch.Tensor],
        shape: Callable[..., Sequence[int]] | None = None,
        *,
        signature: str | None = None,
    ) -> None:
        self.name = name
        self.plain = plain
        self.signature = None if signature is None else Signature(signature)
        INFERENCE_OPERATORS[name] = self
        if _library.error is None:
            self._operator = getattr(torch.ops.effattn, name).default
            if self.signature is not None:
                Glue(name, self.signature).register_fakes("effattn")
            else:
                assert shape is not None
                torch.library.register_fake(f"effattn::{name}", partial(_fake_of_packed, name, shape))
            _recording.register(f"effattn::{name}", plain)

    def serves(self, x: torch.Tensor) -> bool:
        """Whether a kernel takes ``x``; a plain formulation is no faster here than the parts one by one.

        None does in torch.jit.trace, whose graph would pack the weights at every call.
        """
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and _is_tracing():
            return False
        is_transformed = _is_transforming() or forward_ad._current_level >= 0
        find = registry.find_fused if is_compiling else registry.choose_fused
        return not is_transformed and find(self.name, x.device, x.dtype)

    def __call__(self, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Calls the chosen backend; TypeError or ValueError if an argument is wrong that is not packed."""
        find = registry.find if torch.compiler.is_compiling() else registry.choose
        if find(self.name, x.device, x.dtype).namespace is None:
            return self.plain(x, *arguments)
        try:
            out: torch.Tensor = self._operator(x, *arguments)
        except RuntimeError:
            error = None if self.signature is None else self.signature.error((x, *arguments), of_kernels=True)
            if error is not None:
                raise error from None
            raise
        return out


def _fake_of_packed(name: str, shape: Callable[..., Sequence[int]], x: torch.Tensor, *rest: Any) -> torch.Tensor:
    try:
        return empty_image_in_order_of(x, shape(x, *rest))
    except IndexError:
        shapes = [tuple(t.shape) for t in (x, *rest) if isinstance(t, torch.Tensor)]
        raise RuntimeError(f"{name}: a tensor has too few dimensions, got shapes {shapes}") from None


def at_least_float32(weight: torch.Tensor) -> torch.Tensor:
    """A weight in float32, as operators take it, or in float64: kept, it spares 16-bit calls the cast."""
    return weight.float() if weight.dtype.itemsize < 4 else weight


def _require_grad(arguments: Iterable[Argument]) -> bool:
    for argument in arguments:
        if type(argument) in _EAGER:  # isinstance takes longer than all of a call's other questions
            if argument.requires_grad:
                return True
        elif any(t.requires_grad for t in flat((argument,))):
            return True
    return False


def _to_float(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t.float() if t.dtype == dtype else t


def _grouped(tensors: Sequence[Any], lengths: Sequence[int | None]) -> tuple[list[Argument], list[Any]]:
    """Tensors as the arguments that they were, and what is left of them."""
    rest, groups = list(tensors), []
    for n in lengths:
        groups.append(rest[0] if n is None else rest[:n])
        rest = rest[1 if n is None else n :]
    return groups, rest
