"""What operators share whose arguments are images, then weights (tensors or lists of them), then options.

For inference there is ``effattn::<name>``; ``effattn::<name>_forward`` computes the same, may return what the backward
needs beside the output, and carries the autograd formula, because one in Python triples the cost of a call that needs
none. An operator for training alone has the second only. Operators take weights in float32 only, whatever the images
are: they are small, and under autocast they are float32 already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from effattn import _library, registry
from effattn._tracing import untraced
from effattn.backends import Backend, Fused, is_small_call, reference, triton
from effattn.backends._memory import empty_in_order_of
from effattn.ops import _plain

#: A tensor, or a list of them.
Argument = Any


class Operator(NamedTuple):
    """An operator by its name, and how torch is to see it."""

    name: str
    #: Leading arguments that are images: of one dtype, which is the output's.
    images: int
    #: All arguments before the options.
    arguments: int
    #: Raises RuntimeError for arguments that the compiled operator refuses.
    check: Callable[..., None]
    #: Of the output, whose dimensions lie in memory like those of the first image.
    shape: Callable[..., Sequence[int]]
    #: Of arguments, what backends may have a limit for (:mod:`effattn.backends._sizes`).
    sizes: Callable[..., tuple[int, ...]]
    #: Of what ``_forward`` returns beside the output, in float32; None if nothing.
    kept_shape: Callable[..., Sequence[int]] | None = None
    #: Of an output or a gradient of an image, for fake tensors.
    empty: Callable[[torch.Tensor, Sequence[int]], torch.Tensor] = empty_in_order_of
    #: Whether callers get all that ``_forward`` returns, and the backward needs the output as well.
    whole: bool = False

    def __call__(self, *arguments_and_options: Any) -> Any:
        """Calls the chosen backend; arguments are checked by :mod:`effattn.functional`."""
        image = arguments_and_options[0]
        is_compiling = torch.compiler.is_compiling()
        is_tracing = not is_compiling and torch._C._is_tracing()
        if is_tracing:
            with untraced():
                options = arguments_and_options[self.arguments :]
                numbers = (o.item() if isinstance(o, torch.Tensor) else o for o in options)  # sizes, traced
                arguments_and_options = (*arguments_and_options[: self.arguments], *numbers)
                sizes = self.sizes(*arguments_and_options)
                function = registry.find(self.name, image.device, image.dtype, sizes).functions[self.name]
                if not isinstance(function, Fused):
                    self.check(*arguments_and_options)
        else:
            sizes = self.sizes(*arguments_and_options)
            find = registry.find if is_compiling or not all(type(size) is int for size in sizes) else registry.choose
            is_small = is_small_call(arguments_and_options[: self.images])
            function = find(self.name, image.device, image.dtype, sizes, is_small=is_small).functions[self.name]
            if not isinstance(function, Fused):
                self.check(*arguments_and_options)  # plain operations would broadcast instead of complaining
        if not isinstance(function, Fused):
            return function(*arguments_and_options)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            # torch.func and forward mode differentiate through plain operations, never through a kernel.
            return reference.FUNCTIONS[self.name](*arguments_and_options)
        arguments, options = arguments_and_options[: self.arguments], arguments_and_options[self.arguments :]
        if image.dtype != torch.float32:
            weights = (
                _mapped(lambda t: t.float() if t.dtype == image.dtype else t, a) for a in arguments[self.images :]
            )
            arguments = (*arguments[: self.images], *weights)
        # A trace holds what can be differentiated, however it is made: torch checks it by one without gradients.
        if is_tracing or (torch.is_grad_enabled() and any(t.requires_grad for t in _flat(arguments))):
            out = function.forward(*arguments, *options)
            return out if self.whole or isinstance(out, torch.Tensor) else out[0]
        return function.inference(*arguments, *options)

    def register(self) -> None:
        """Tells torch of the fake kernels and the autograd formula, for every backend with operators of its own."""
        if _library.error is None:
            self._register("effattn")
        if triton.register(self.name, self._check_for_triton, self._check_backward_for_triton):
            self._register(triton.NAMESPACE)

    def _register(self, namespace: str) -> None:
        name = f"{namespace}::{self.name}"
        if not self.whole:
            torch.library.register_fake(name, self._fake)
        torch.library.register_fake(f"{name}_forward", self._fake_forward)
        torch.library.register_fake(f"{name}_backward", self._fake_backward)
        formula = partial(self._backward, namespace)
        torch.library.register_autograd(f"{name}_forward", formula, setup_context=self._setup_context)
        plain = reference.FUNCTIONS[self.name]
        if not self.whole:
            _plain.register(name, plain)
        _plain.register(f"{name}_forward", plain, outputs=1 if self.kept_shape is None else 2)
        _plain.register_backward(f"{name}_backward", plain, self._split_backward)

    def _split_backward(self, grad_out: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """The arguments of the forward among those of the backward."""
        kept = 0 if self.kept_shape is None else 2 if self.whole else 1
        return grad_out, (*rest[: self.arguments], *rest[self.arguments + kept :])

    def _check_for_triton(self, *arguments: Any) -> None:
        self.check(*arguments)
        for weight in _flat(arguments[self.images : self.arguments]):
            torch._check(weight.dtype == torch.float32, lambda: "weights must be float32")
        triton.check_sizes(self.name, self.sizes(*arguments))

    def _check_backward_for_triton(self, grad_out: torch.Tensor, *rest: Any) -> None:
        _, arguments = self._split_backward(grad_out, *rest)
        self._check_for_triton(*arguments)
        image, shape = rest[0], tuple(self.shape(*arguments))
        torch._check(grad_out.shape == shape, lambda: f"grad_out must have the shape of the output, {shape}")
        torch._check(grad_out.dtype == image.dtype, lambda: "grad_out must have the dtype of the output")
        torch._check(grad_out.device == image.device, lambda: "grad_out must be on the device of the output")
        if self.kept_shape is not None:
            given, shape = rest[self.arguments], tuple(self.kept_shape(*arguments))
            torch._check(given.shape == shape, lambda: f"sums must have the shape of the forward's, {shape}")
            torch._check(given.dtype == torch.float32, lambda: "sums must be float32")
            torch._check(given.device == image.device, lambda: "sums must be on the device of the output")

    def _fake(self, *arguments: Any) -> torch.Tensor:
        self.check(*arguments)
        return self.empty(arguments[0], self.shape(*arguments))

    def _fake_forward(self, *arguments: Any) -> Any:
        out = self._fake(*arguments)
        if self.kept_shape is None:
            return out
        return out, out.new_empty(tuple(self.kept_shape(*arguments)), dtype=torch.float32)

    def _fake_backward(self, grad_out: torch.Tensor, *arguments: Any) -> tuple[Argument, ...]:
        images = (self.empty(t, t.shape) for t in arguments[: self.images])
        weights = arguments[self.images : self.arguments]
        return *images, *(_mapped(lambda t: t.new_empty(t.shape), a) for a in weights)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        arguments, ctx.options = inputs[: self.arguments], inputs[self.arguments :]
        # A list by its length, a tensor by None.
        ctx.lengths = [None if isinstance(a, torch.Tensor) else len(a) for a in arguments]
        kept: tuple[torch.Tensor, ...] = ()
        if self.kept_shape is not None:
            kept = output if self.whole else output[1:]
            ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_flat(arguments), *kept)

    def _backward(self, namespace: str, ctx: Any, grad_out: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
        no_options = (None for _ in ctx.options)
        if grad_out is None:
            return *(None if n is None else [None] * n for n in ctx.lengths), *no_options
        arguments, kept = _grouped(ctx.saved_tensors, ctx.lengths)
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate this again
            return *self._differentiable_backward(grad_out, arguments, ctx.options), *no_options
        backward = getattr(getattr(torch.ops, namespace), f"{self.name}_backward")
        return *backward(grad_out, *arguments, *kept, *ctx.options), *no_options

    def _differentiable_backward(
        self, grad_out: torch.Tensor, arguments: list[Argument], options: tuple[Any, ...]
    ) -> list[Argument]:
        """The gradients by way of the reference, which has derivatives of every order."""
        tensors = list(_flat(arguments))
        out = reference.FUNCTIONS[self.name](*arguments, *options)
        out = out[0] if self.whole else out
        wanted = [t for t in tensors if t.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
        lengths = [None if isinstance(a, torch.Tensor) else len(a) for a in arguments]
        return _grouped([next(grads) if t.requires_grad else None for t in tensors], lengths)[0]


class InferenceOperator(NamedTuple):
    """An operator ``effattn::<name>`` of a module's inference: it has no autograd formula."""

    name: str

    def serves(self, x: torch.Tensor) -> bool:
        """Whether a kernel takes ``x``; a plain formulation is no faster here than the parts one by one.

        None does in torch.jit.trace, whose graph would pack the weights at every call.
        """
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and torch._C._is_tracing():
            return False
        plain = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        find = registry.find_fused if is_compiling else registry.choose_fused
        return not plain and find(self.name, x.device, x.dtype)

    def __call__(self, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Calls the chosen backend."""
        function = self._backend(x).functions[self.name]
        assert not isinstance(function, Fused)
        return function(x, *arguments)

    def register(self, fake: Callable[..., torch.Tensor]) -> None:
        """Tells torch of the fake kernel."""
        if _library.error is None:
            torch.library.register_fake(f"effattn::{self.name}", fake)
            _plain.register(f"effattn::{self.name}", reference.FUNCTIONS[self.name])

    def _backend(self, x: torch.Tensor) -> Backend:
        find = registry.find if torch.compiler.is_compiling() else registry.choose
        return find(self.name, x.device, x.dtype)


def widened(weight: torch.Tensor) -> torch.Tensor:
    """A weight in float32, as operators take it, or in float64: kept, it spares calls on narrow images the cast."""
    return weight.float() if weight.dtype.itemsize < 4 else weight


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], argument: Argument) -> Argument:
    return function(argument) if isinstance(argument, torch.Tensor) else [function(t) for t in argument]


def _flat(arguments: Iterable[Argument]) -> list[torch.Tensor]:
    return [t for a in arguments for t in ((a,) if isinstance(a, torch.Tensor) else a)]


def _grouped(tensors: Sequence[Any], lengths: Sequence[int | None]) -> tuple[list[Argument], list[Any]]:
    """Tensors as the arguments that they were, and what is left of them."""
    rest, groups = list(tensors), []
    for n in lengths:
        groups.append(rest[0] if n is None else rest[:n])
        rest = rest[1 if n is None else n :]
    return groups, rest
