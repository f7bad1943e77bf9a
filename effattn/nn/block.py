"""Blocks of known networks: their own modules, whose inference on the CPU is one program."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from effattn._tracing import constant_result
from effattn.nn.fold_cache import FoldCache, cached
from effattn.nn.origin import original_class
from effattn.nn.programs import EMITTERS, Unknown, make_program
from effattn.nn.projection import is_autocast
from effattn.nn.recorded import FxLeaf
from effattn.ops import _program
from effattn.ops import block as _block


class _InGraph(NamedTuple):
    """What a graph of torch.compile says of a block: its number, and the program that it had."""

    number: int
    program: str
    returns_tokens: bool
    channels: int
    has_size: bool  #: whether the program takes images of one size alone


#: Where a block keeps what graphs say of it.
GRAPH = "_effattn_in_graph"
_numbers = itertools.count()


class Block(FoldCache):
    """What :func:`effattn.accelerate` makes a block of a network: a subclass of the block's own class.

    In evaluation without gradients, a float32 image on the CPU goes through one operator, ``effattn::block``, with
    BatchNorm folded in; :attr:`program` shows it. ``torch.compile`` makes one node of it. Everything else goes through
    the original forward: training, autocast, other dtypes and devices, exports and traces, and blocks whose parts have
    hooks or were exchanged for others. See :class:`effattn.nn.fold_cache.FoldCache` for how long the folded weights are
    kept; a compiled graph uses the same.
    """

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """As the original's; (B, C, H, W) -> (B, C_out, H', W'), of x's memory format."""
        if not args and not kwargs:
            if torch.compiler.is_compiling():
                in_graph = self._in_graph(x)
                if in_graph is not None:
                    out = torch.ops.effattn.block_of_module(x, in_graph.number, in_graph.program)
                    return out.flatten(2).transpose(1, 2) if in_graph.returns_tokens else out
            elif type(x) is torch.Tensor:
                found = self._block_for(x)
                if found is not None:
                    block, returns_tokens = found
                    out = _block.block(x, block)
                    return out.flatten(2).transpose(1, 2) if returns_tokens else out
        return super().forward(x, *args, **kwargs)

    @property
    def program(self) -> str:
        """The program that the block is now, as text.

        Raises:
            Unknown: if it is none, with the reason.
        """
        return make_program(self, EMITTERS)[0].program

    def prepare_for_graphs(self) -> None:
        """To be called once the class is exchanged, and for a copy."""
        block, returns_tokens = make_program(self, EMITTERS, shapes_only=True)
        steps = _program.parse(block.program)
        has_size = any(step.operation == "attention" for step in steps)
        self._take_number(_InGraph(next(_numbers), block.program, returns_tokens, steps[0].channels, has_size))

    def _take_number(self, in_graph: _InGraph) -> None:
        self.__dict__[GRAPH] = in_graph
        _block.CALLED_BY_GRAPHS[in_graph.number] = self

    def call_from_graph(self, x: torch.Tensor, program: str) -> torch.Tensor:
        """What a node of a graph does: the block as it is now. One that has become another goes through its own
        forward."""
        found = self._block_for(x)
        if found is not None and found[0].program == program:
            return _block.block(x, found[0])
        result = _block.empty_result(x, program)  # as the graph expects it
        out = original_class(self).forward(self, x)
        return result.copy_(out if out.dim() == 4 else out.transpose(1, 2).reshape(result.shape))

    def _in_graph(self, x: Any) -> _InGraph | None:
        """Where torch.compile records a call that the operator can stand for."""
        in_graph: _InGraph | None = self.__dict__.get(GRAPH)
        if in_graph is None or self.training or torch.is_grad_enabled() or torch.compiler.is_exporting():
            return None
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
            return None
        if is_autocast(x) or not _block.serves(x):
            return None
        if x.shape[1] != in_graph.channels:
            return None
        if not in_graph.has_size:
            return in_graph
        return in_graph if _takes(in_graph.program, in_graph.channels, int(x.shape[2]), int(x.shape[3])) else None

    def _block_for(self, x: torch.Tensor) -> tuple[_block.Block, bool] | None:
        """The program for an image and whether it returns (B, N, C); None where the original must be called."""
        if x.dtype != torch.float32 or x.dim() != 4 or x.device.type != "cpu":
            return None
        folds = self._folds()
        if folds is None or is_autocast(x) or _has_any_global_hook() or not _block.serves(x):
            return None
        found: tuple[_block.Block, bool] | None = cached(folds, "block", self._make)
        if found is None:
            return None
        return found if _program.takes(found[0].program, *x.shape[1:]) else None

    def _make(self) -> tuple[_block.Block, bool] | None:
        try:
            return make_program(self, EMITTERS)
        except Unknown:
            return None

    def __prepare_scriptable__(self) -> nn.Module:
        return FxLeaf.__prepare_scriptable__(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (original_class(self),), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        in_graph: _InGraph | None = self.__dict__.get(GRAPH)
        if in_graph is not None:  # a graph of the one that this is a copy of must not find it
            self._take_number(in_graph._replace(number=next(_numbers)))


def block_class(original: type[nn.Module]) -> type[Block]:
    """The subclass of a module's class that is a :class:`Block`; one for each class."""
    key: Any = original
    return _block_class(key)


@cache
def _block_class(original: Any) -> type[Block]:
    return type(original.__name__, (Block, original), {"__module__": __name__, "__doc__": Block.__doc__})


def _new(original: type[nn.Module]) -> Block:
    cls = block_class(original)
    return cls.__new__(cls)


@constant_result
def _takes(program: str, channels: int, height: int, width: int) -> bool:
    return _program.takes(program, channels, height, width)
