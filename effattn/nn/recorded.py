"""Modules while something makes a graph of what calls them: torch.fx, or an ONNX exporter."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn.modules.module import _has_any_global_hook

from effattn._tracing import NOT_SCRIPTABLE
from effattn.nn.fold_cache import HOOKS


class FxLeaf(nn.Module):
    """A module of which torch.fx makes one node, whatever its tracer takes for a leaf; torch.jit.script refuses it."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(f"TorchScript error: {NOT_SCRIPTABLE}")

    def _fx_node(self, x: Proxy, *args: Any) -> Any:
        """What :meth:`forward` returns for a Proxy: a node that calls this module.

        A tracer has called the hooks by then, and recorded what they do, as it has for every module that is no leaf to
        it: a module with hooks becomes a call of its forward alone.
        """
        tracer: Any = x.tracer
        if self is tracer.root:
            raise TraceError(
                f"{type(self).__name__} cannot be the root that torch.fx traces, only a part of it: "
                "trace torch.nn.Sequential(module)"
            )
        path = tracer.path_of_module(self)
        if _has_any_global_hook() or any(self.__dict__[name] for name in HOOKS):
            module = tracer.create_proxy("get_attr", path, (), {})
            return tracer.create_proxy("call_method", "forward", (module, x, *args), {})
        return tracer.create_proxy("call_module", path, (x, *args), {})
