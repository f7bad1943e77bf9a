"""What makes a graph of a call: torch.jit.trace, the ONNX exporters and, refused, torch.jit.script."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

#: Why torch.jit.script takes neither the modules nor the functions.
NOT_SCRIPTABLE = (
    "effattn cannot be compiled by torch.jit.script: use torch.compile, torch.export with AOTInductor, or "
    "torch.jit.trace, or undo effattn.accelerate with effattn.restore(model) first"
)
#: Why the ONNX exporter that takes traces cannot take what torch.jit.trace made.
NOT_IN_A_TRACE = (
    "torch.onnx.export cannot translate effattn's operators in a graph that torch.jit.trace made: give it the module "
    'itself, or call torch.jit.trace inside effattn.use_backend("reference")'
)


def is_exporting_to_onnx() -> bool:
    """Whether one of torch's two ONNX exporters records this call."""
    return (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


#: (operator, activations) -> whether an ONNX export keeps the call as a node of effattn's own; None: no call is.
Keeps = Callable[[str, Sequence[torch.Tensor]], bool]
_keeps: Keeps | None = None


@contextmanager
def keeping_nodes(keeps: Keeps) -> Iterator[None]:
    """Exports to ONNX inside of it keep calls of operators as nodes, those for which ``keeps`` says so."""
    global _keeps
    before, _keeps = _keeps, keeps
    try:
        yield
    finally:
        _keeps = before


def becomes_node(operator: str, *activations: torch.Tensor) -> bool:
    """Whether this call, which an ONNX export records, is kept as a node."""
    return _keeps is not None and is_exporting_to_onnx() and _keeps(operator, activations)


@contextmanager
def untraced() -> Iterator[None]:
    """Pauses torch.jit.trace: sizes are ints again, and what is computed is no part of the graph."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def needs_gradients() -> bool:
    """Whether a call must be differentiable: gradients are enabled, or torch.jit.trace makes a graph for both."""
    return torch.is_grad_enabled() or (not torch.compiler.is_compiling() and torch._C._is_tracing())


def static_shape(t: torch.Tensor) -> tuple[int, ...]:
    """The shape, for decisions that the graph keeps: torch.jit.trace makes tensors of sizes that the graph computes."""
    if torch.compiler.is_compiling() or not torch._C._is_tracing():
        return t.shape
    with untraced():
        return t.shape


def constant_result(function: Callable[..., Any]) -> Any:
    """As torch.compiler.assume_constant_result, without its import of torch._dynamo, which takes as long as torch's."""
    when_imported("torch._dynamo", lambda dynamo: dynamo.assume_constant_result(function))
    return function


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Calls back with a module: now if it is loaded, or else once it is, which costs nothing until then."""
    module = sys.modules.get(name)
    if module is not None:
        callback(module)
        return
    if name not in _hooks:
        _hooks[name] = _ImportHook(name)
        sys.meta_path.insert(0, _hooks[name])
    _hooks[name].callbacks.append(callback)


class _ImportHook(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the loader of a module until it is loaded."""

    def __init__(self, name: str) -> None:
        self.callbacks: list[Callable[[ModuleType], None]] = []
        self._name = name
        self._loader: Any = None
        self._is_asking_others = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._name or self._is_asking_others:
            return None
        self._is_asking_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_asking_others = False
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path.remove(self)
        for callback in self.callbacks:
            callback(module)


_hooks: dict[str, _ImportHook] = {}
