"""What modules compute from parameters alone (folded, gathered, packed weights), cached until something changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.autograd import forward_ad

from effattn._library import _C

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


#: What something is derived from: a module with all its parts, or named tensors.
Part: TypeAlias = nn.Module | dict[str, Any] | None


class Fingerprint:
    """Parts of a module as they were: whether everything that torch counts is as it was.

    A cascade has some thirty modules and sixty tensors, and may take less time than a walk over them in Python: what is
    compared lies in flat lists, over which compiled code walks. A module that keeps this hands over its
    parameters and its parts, not itself, or only the garbage collector could free it.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._hooks: list[Any] = []
        # Looked up by name in a dictionary, and what was found there.
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._found: list[Any] = []
        self._children: list[dict[str, Any]] = []
        self._modules: list[nn.Module] = []
        self._tensors: list[torch.Tensor] = []
        for part in parts:
            if isinstance(part, nn.Module):
                self._add_module(part)
            elif part is not None:
                self._add_tensors(part)
        self._classes = [module.__class__ for module in self._modules]
        self._own = [module.__dict__ for module in self._modules]
        self._sizes = list(map(len, self._children))
        self._versions = [t._version for t in self._tensors]
        self._addresses = [t.data_ptr() for t in self._tensors]
        # The tensors' memory is held on to, so that nothing that follows them can come to lie in it.
        self._held = [t.detach() for t in self._tensors]

    def _add_module(self, module: nn.Module) -> None:
        own, parts = module.__dict__, module._modules
        self._modules.append(module)
        self._hooks += (own[name] for name in HOOKS)
        self._add_tensors(module._parameters)
        # Buffers include the number of batches: it counts, which batch_norm does not, when the statistics move.
        self._add_tensors(module._buffers)
        self._children.append(parts)
        for name in ("training", "eps"):  # what folding reads beside tensors
            if name in own:
                self._look_up(own, name, own[name])
        for name, part in parts.items():
            self._look_up(parts, name, part)
            if part is not None:
                self._add_module(part)

    def _add_tensors(self, tensors: dict[str, Any]) -> None:
        for name, t in tensors.items():
            self._look_up(tensors, name, t)
            if t is not None:
                self._tensors.append(t)

    def _look_up(self, owner: dict[str, Any], name: str, found: Any) -> None:
        self._owners.append(owner)
        self._names.append(name)
        self._found.append(found)

    def holds(self, parts: Sequence[Part]) -> bool:
        """Whether these are the same parts, nothing of them has changed, and nothing listens."""
        assert _C is not None
        return (
            len(parts) == len(self._parts)
            and all(map(is_, parts, self._parts))
            and _C.all_empty(self._hooks)
            and _C.same_modules(self._modules, self._classes, self._own, self._children, self._sizes)
            and _C.same_items(self._owners, self._names, self._found)
            and _C.same_tensors(self._tensors, self._versions, self._addresses)
        )


class _Kept(NamedTuple):
    watch: Fingerprint
    derived: Any


#: Derivations that a module keeps, by name and size of the image; the oldest goes first.
MAX_ENTRIES = 8


class FoldCache(nn.Module):
    """A module that keeps what is computed from its parts, in evaluation without gradients.

    It is made anew after anything that changes their parameters and buffers in a way torch counts (loading, an
    optimiser's step, conversions), after a part is exchanged or hooked, after a change of mode, and after a call with
    gradients, since torch's fused optimisers do not count; only writing to ``.data`` in evaluation mode goes unseen.
    """

    def _cached(self, name: str, parts: Sequence[Part], make: Callable[[], Any]) -> Any:
        """What ``make`` returns, from the last call if what it depends on is the same.

        Args:
            parts: modules, and dictionaries of parameters of this one.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _C is None:
            return make()
        if torch._C._len_torch_dispatch_stack() > 0:  # fake tensors, tracing: what is made belongs there
            return make()
        if torch.is_grad_enabled():
            invalidate(self)
            return make()
        if forward_ad._current_level >= 0:  # a dual number has its primal's address
            return make()
        all_kept: dict[str, _Kept] = self.__dict__.setdefault("_effattn_fold_cache", {})
        kept = all_kept.get(name)
        if kept is not None and kept.watch.holds(parts):
            return kept.derived
        try:
            watch = Fingerprint(parts)
        except RuntimeError:  # inference tensors count no versions
            all_kept.pop(name, None)
            return make()
        derived = make()
        all_kept.pop(name, None)
        while len(all_kept) >= MAX_ENTRIES:  # what is kept for images of many sizes must not fill the memory
            all_kept.pop(next(iter(all_kept)), None)  # another thread may have been faster
        all_kept[name] = _Kept(watch, derived)
        return derived

    def _apply(self, fn: Any, recurse: bool = True) -> FoldCache:
        invalidate(self)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> FoldCache:
        invalidate(self)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_effattn_fold_cache"}


def invalidate(module: nn.Module) -> None:
    """Drops what :class:`FoldCache` kept."""
    module.__dict__.pop("_effattn_fold_cache", None)
