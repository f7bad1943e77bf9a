"""Blocks of known networks: their own modules, whose inference on the CPU is one program."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from effattn.nn.fold_cache import FoldCache, cached
from effattn.nn.origin import original_class
from effattn.nn.programs import EMITTERS, Unknown, make_program
from effattn.nn.projection import is_autocast
from effattn.nn.recorded import FxLeaf
from effattn.ops import block as _block


class Block(FoldCache):
    """What :func:`effattn.accelerate` makes a block of a network: a subclass of the block's own class.

    In evaluation without gradients, a float32 image on the CPU goes through one operator, ``effattn::block``, with
    BatchNorm folded in; :attr:`program` shows it. Everything else goes through the original forward: training, autocast,
    other dtypes and devices, ``torch.compile``, traces, and blocks whose parts have hooks or were exchanged for others.
    See :class:`effattn.nn.fold_cache.FoldCache` for how long the folded weights are kept.
    """

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """As the original's; (B, C, H, W) -> (B, C_out, H', W'), of x's memory format."""
        if not args and not kwargs and type(x) is torch.Tensor:
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

    def _block_for(self, x: torch.Tensor) -> tuple[_block.Block, bool] | None:
        if torch.compiler.is_compiling() or x.dtype != torch.float32 or x.dim() != 4 or x.device.type != "cpu":
            return None
        folds = self._folds()
        if folds is None or is_autocast(x) or _has_any_global_hook() or not _block.serves(x):
            return None
        found: tuple[_block.Block, bool] | None = cached(folds, "block", self._make)
        if found is None:
            return None
        program, channels, size = found[0].program, x.shape[1], x.shape[2:]
        takes = cached(folds, ("takes", channels, *size), lambda: _block.takes(program, channels, *size))
        return found if takes else None

    def _make(self) -> tuple[_block.Block, bool] | None:
        try:
            return make_program(self, EMITTERS)
        except Unknown:
            return None

    def __prepare_scriptable__(self) -> nn.Module:
        return FxLeaf.__prepare_scriptable__(self)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (original_class(self),), self.__getstate__()


@cache
def block_class(original: type[nn.Module]) -> type[Block]:
    """The subclass of a module's class that is a :class:`Block`."""
    return type(original.__name__, (Block, original), {"__module__": __name__, "__doc__": Block.__doc__})


def _new(original: type[nn.Module]) -> Block:
    cls = block_class(original)
    return cls.__new__(cls)
