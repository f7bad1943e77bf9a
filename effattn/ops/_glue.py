"""Checks of a torch operator's arguments and allocation of its results: what csrc/<op>.cpp does in C++, in Python.

For fake tensors, which C++ never sees, and for Triton's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from effattn.backends._memory import empty_image_in_order_of, empty_in_order_of
from effattn.ops._signature import Signature

#: A tensor, or a list of them.
Argument = Any
Shapes = Sequence[tuple[Any, ...]]


class Glue:
    """Checks and allocation for ``<name>``, ``<name>_forward`` and ``<name>_backward``, which have one signature."""

    def __init__(self, name: str, signature: Signature) -> None:
        self.name = name
        self.signature = signature
        self._empty = empty_image_in_order_of if signature.is_of_images else empty_in_order_of

    def check(self, arguments: Sequence[Any], *, of_kernels: bool = False) -> Shapes:
        """Returns the shapes of the output and of what is kept; RuntimeError if an argument is wrong."""
        self.refuse(self.signature.error(arguments, of_kernels=of_kernels))
        sizes = self.signature.sizes(arguments)
        return [returned.shape.sizes(sizes) for returned in (self.signature.out, *self.signature.kept)]

    def check_backward(self, grad_out: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
        """Returns the forward's arguments, which a backward takes too; RuntimeError if one is wrong."""
        _, arguments = self.split_backward(grad_out, *rest)
        kept = rest[self.signature.num_tensors :][: len(self.signature.backward_takes)]
        self.refuse(self.signature.error(arguments))
        self.refuse(self.signature.error_of_backward(grad_out, arguments, kept))
        return arguments

    def split_backward(self, grad_out: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """The arguments of the forward among those of the backward."""
        tensors = self.signature.num_tensors
        options = rest[tensors + len(self.signature.backward_takes) :]
        return grad_out, self.signature.without_none((*rest[:tensors], *options))

    def refuse(self, error: Exception | None) -> None:
        if error is not None:
            raise RuntimeError(f"{self.name}: {error}")

    def new_outputs(self, arguments: Sequence[Any], shapes: Shapes) -> list[torch.Tensor]:
        """The output and what is kept, to be filled."""
        out = self._empty(arguments[0], shapes[0])
        return [out, *(out.new_empty(shape, dtype=torch.float32) for shape in shapes[1:])]

    def new_gradients(self, arguments: Sequence[Any]) -> list[Argument]:
        activations, rest = arguments[: self.signature.num_activations], arguments[self.signature.num_activations :]
        weights = rest[: self.signature.num_tensors - self.signature.num_activations]
        return [*(self._empty(t, t.shape) for t in activations), *(mapped(_new_empty, a) for a in weights)]

    # --- fake kernels -------------------------------------------------------------------------------------------

    def register_fakes(self, namespace: str) -> None:
        """With torch, of the operators that are in the namespace."""
        name = f"{namespace}::{self.name}"
        if self.signature.out.kind != "kept":
            torch.library.register_fake(name, self._fake)
        if self.signature.out.kind != "alone":
            torch.library.register_fake(f"{name}_forward", self._fake_forward)
            torch.library.register_fake(f"{name}_backward", self._fake_backward)

    def _fake_outputs(self, *arguments: Any) -> list[torch.Tensor]:
        arguments = self.signature.without_none(arguments)
        return self.new_outputs(arguments, self.check(arguments))

    def _fake(self, *arguments: Any) -> torch.Tensor:
        return self._fake_outputs(*arguments)[0]

    def _fake_forward(self, *arguments: Any) -> Any:
        outs = self._fake_outputs(*arguments)
        return tuple(outs) if self.signature.kept else outs[0]

    def _fake_backward(self, grad_out: torch.Tensor, *rest: Any) -> tuple[Argument, ...]:
        return tuple(self.new_gradients(self.check_backward(grad_out, *rest)))


def mapped(function: Callable[..., torch.Tensor], argument: Argument, *more: Any) -> Argument:
    return function(argument, *more) if isinstance(argument, torch.Tensor) else [function(t, *more) for t in argument]


def flat(arguments: Iterable[Argument]) -> list[torch.Tensor]:
    return [t for a in arguments for t in ((a,) if isinstance(a, torch.Tensor) else a)]


def _new_empty(t: torch.Tensor) -> torch.Tensor:
    return t.new_empty(t.shape)
