"""The plain formulation of a compiled operator, for those who cannot take the operator: it is the reference.

ONNX exporters record it in place of the operator, and FLOPs are those that it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils import _pytree as pytree

from effattn._cache import BoundedCache
from effattn._tracing import NOT_IN_A_TRACE, when_imported

#: (arguments of a backward operator) -> (gradient of the output, arguments of the plain function).
Split = Callable[..., tuple[torch.Tensor, Sequence[Any]]]
#: Of the exporter that takes traces.
_FIRST_OPSET = 7


def register(operator: str, plain: Callable[..., Any], outputs: int = 1) -> None:
    """Of a forward operator.

    Args:
        operator: "namespace::name".
        plain: of the operator's arguments.
        outputs: how many the operator has; those that ``plain`` does not return are for the backward.
    """

    def decompose(mode: Any, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """The rule for make_fx, by which an ExportedProgram is decomposed for ONNX."""
        if not torch.onnx.is_in_onnx_export():
            return mode.__torch_dispatch__(func, types, args, kwargs or {})
        with mode:
            out = plain(*_with_empty_lists(func, args), **(kwargs or {}))
        return out if outputs == 1 or isinstance(out, tuple) else (out, *(None for _ in range(outputs - 1)))

    def refuse(*_: Any) -> None:
        raise torch.onnx.OnnxExporterError(NOT_IN_A_TRACE)

    torch.library.register_torch_dispatch(operator, ProxyTorchDispatchMode, decompose)
    when_imported(
        "torch.onnx._internal.torchscript_exporter.registration",
        lambda exporter: exporter.custom_onnx_symbolic(operator, _FIRST_OPSET)(refuse),
    )
    _register_flops(operator, lambda arguments: lambda: plain(*arguments))


def register_backward(operator: str, plain: Callable[..., Any], split: Split) -> None:
    """Of a backward operator, whose FLOPs are those of autograd through ``plain``."""

    def prepared(args: Sequence[Any]) -> Callable[[], Any]:
        grad_out, arguments = split(*args)
        leaves = [t.requires_grad_() for t in _tensors(arguments)]
        with torch.enable_grad():
            out = plain(*arguments)
        return lambda: torch.autograd.grad(
            out[0] if isinstance(out, tuple) else out, leaves, grad_out, allow_unused=True
        )

    _register_flops(operator, prepared)


def _register_flops(operator: str, prepared: Callable[[Sequence[Any]], Callable[[], Any]]) -> None:
    """``prepared`` makes of the operator's arguments, on the meta device, what is to be counted."""
    namespace, name = operator.split("::")
    packet = getattr(getattr(torch.ops, namespace), name)
    known: BoundedCache[str, int] = BoundedCache()

    def register_formula(flop_counter: ModuleType) -> None:
        @flop_counter.register_flop_formula(packet, get_raw=True)
        def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            key = str(pytree.tree_map_only(torch.Tensor, lambda t: (t.dtype, *t.shape), args))
            flops = known.get(key)
            if flops is None:
                like = pytree.tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), args)
                # What is below torch_dispatch has no autograd.
                with torch.overrides.enable_reentrant_dispatch(), flop_counter.FlopCounterMode(display=False) as outer:
                    run = prepared(_with_empty_lists(packet.default, like))
                    before = outer.get_total_flops()
                    run()
                    flops = known[key] = outer.get_total_flops() - before
            return flops

    when_imported("torch.utils.flop_counter", register_formula)


def _with_empty_lists(func: Any, args: Sequence[Any]) -> list[Any]:
    """Lists that may be empty may be None too."""
    types = [str(argument.type) for argument in func._schema.arguments]
    return [[] if arg is None and "List[Tensor]" in kind else arg for arg, kind in zip(args, types, strict=False)]


def _tensors(arguments: Iterable[Any]) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(list(arguments)) if isinstance(t, torch.Tensor)]
