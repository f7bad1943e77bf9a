"""Triton's kernels as torch operators: those of csrc once more, in a namespace of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from effattn._cache import BoundedCache
from effattn.backends import triton
from effattn.backends._base import NamedSizes, beyond
from effattn.ops._glue import Argument, Glue, Shapes

_LIBRARY = torch.library.Library(triton.NAMESPACE, "FRAGMENT")


class TritonOperators:
    """The operators for inference, the forward and the backward of one specification: checked, allocated, launched."""

    def __init__(self, glue: Glue, named_sizes: Callable[..., NamedSizes], launchers: triton.Launchers) -> None:
        self._glue, self._named_sizes, self._launchers = glue, named_sizes, launchers
        self._activations = glue.signature.num_activations, glue.signature.is_of_images
        #: Shapes of results by what validation depends on, of valid calls: a check takes as long as a launch.
        self._known: BoundedCache[tuple[Any, ...], Shapes] = BoundedCache()
        *inference, forward, backward = glue.signature.schemas(glue.name)
        for schema in inference:  # none where the output is kept
            _define(schema, self._inference)
        _define(forward, self._forward if glue.signature.kept else self._inference)
        _define(backward, self._backward)

    def _inference(self, *arguments: Any) -> torch.Tensor:
        return self._forward(*arguments)[0]

    def _forward(self, *arguments: Any) -> list[torch.Tensor]:
        arguments = self._glue.signature.without_none(arguments)
        outs = self._glue.new_outputs(arguments, self._shapes(arguments))
        triton.launch(self._launchers, self._launchers.forward, outs[0], outs, arguments, *self._activations)
        return outs

    def _backward(self, grad_out: torch.Tensor, *rest: Any) -> list[Argument]:
        key = _kinds((grad_out, *rest))
        if key not in self._known:
            self._shapes(self._glue.check_backward(grad_out, *rest))
            self._known[key] = ()
        _, arguments = self._glue.split_backward(grad_out, *rest)
        grads = self._glue.new_gradients(arguments)
        tensors = self._glue.signature.num_tensors
        given = (grad_out, *arguments[:tensors], *rest[tensors:])
        count, are_images = self._activations
        triton.launch(self._launchers, self._launchers.backward, grad_out, grads, given, 1 + count, are_images)
        return grads

    def _shapes(self, arguments: Sequence[Any]) -> Shapes:
        """Of the results; RuntimeError if an argument is wrong, or more than the kernels take."""
        key = _kinds(arguments)
        shapes = self._known.get(key)
        if shapes is None:
            shapes = self._glue.check(arguments, of_kernels=True)
            reasons = beyond(self._named_sizes(*arguments), triton.LIMITS)
            if reasons:
                self._glue.refuse(RuntimeError(f"the kernels take {reasons[0].removeprefix('takes ')}"))
            self._known[key] = shapes
        return shapes


def _define(schema: str, implementation: Callable[..., Any]) -> None:
    _LIBRARY.define(schema)
    _LIBRARY.impl(schema.split("(")[0], implementation, "CPU" if triton.is_interpreted() else "CUDA")


def _kinds(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """The cache's key: what validation depends on, of tensors shape, dtype, device and layout, not the numbers."""
    return tuple(
        (a.is_nested or a.shape, a.dtype, a.device, a.layout)
        if isinstance(a, torch.Tensor)
        else _kinds(a)
        if isinstance(a, (list, tuple))
        else a
        for a in arguments
    )
