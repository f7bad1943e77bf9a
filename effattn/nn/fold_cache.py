"""What modules compute from parameters alone (folded, gathered, packed weights), cached until something changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from effattn._library import _C

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: Attributes of parts that decide, beside tensors, what is folded or whether it can be.
_ATTRIBUTES = (
    *("training", "eps", "p", "inplace", "approximate"),
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("scale_factor", "mode", "align_corners"),
    # Of blocks (effattn.nn.programs), which fold what attention modules look up at every call.
    *("dim", "num_heads", "key_dim", "scale", "drop", "drop_prob", "add_maxpool"),
    *("count_include_pad", "ceil_mode", "divisor_override", "size"),
)
#: Elements of tensors that a fingerprint compares at most: more than a module of any model of the papers has rows and
#: columns. Of the commonest 2,000 take 1 us, of the widest 19,000 take 7, with memory in cache.
_MAX_ELEMENTS = 32768
#: Entries that a module keeps (one a size of image and dtype, or several); the oldest goes first.
MAX_ENTRIES = 16


class _Steps:
    """The steps of all optimisers, as far as a fold cache must know of them."""

    count = 0
    #: Set by the hook, counted by whoever looks: a compiled step would be compiled again for every count.
    pending = False
    lock = threading.Lock()


def _note_step(*_: Any) -> None:
    _Steps.pending = True


# torch's fused optimisers change weights without counting versions.
register_optimizer_step_post_hook(_note_step)


def _steps() -> int:
    with _Steps.lock:
        if _Steps.pending:
            _Steps.pending = False
            _Steps.count += 1
        return _Steps.count


class Fingerprint:
    """A module's parameters, buffers and parts as they were, and whether they still are.

    Compared are: which modules and tensors there are; classes, hooks and the attributes that folding reads; version and
    address of every tensor; on the CPU the content of some elements, one a row and a column, which sees what
    is written through ``.data``; and, once an optimiser has stepped, the content of all. It refers to the parts and not
    to the module, which keeps it, or only the garbage collector could free that.

    Raises:
        RuntimeError: for inference tensors, which have no version.
    """

    def __init__(self, module: nn.Module) -> None:
        assert _C is not None
        self._step = _steps()
        self._hooks: list[Any] = []
        # Looked up by name in a dictionary, and what was found there.
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._found: list[Any] = []
        self._children: list[dict[str, Any]] = []
        self._modules: list[nn.Module] = []
        self._tensors: list[torch.Tensor] = []
        self._add_contents(module)
        self._own = self._children[:3]
        self._were_empty = [not hooks for hooks in self._hooks]
        self._classes = [part.__class__ for part in self._modules]
        # What is put on an instance, a forward or a tensor in a parameter's place, is one more entry.
        self._dictionaries = [*self._children, *(part.__dict__ for part in self._modules)]
        self._sizes = list(map(len, self._dictionaries))
        self._versions = [t._version for t in self._tensors]
        self._addresses = [t.data_ptr() for t in self._tensors]
        # Keeps the tensors' memory, so that nothing that follows them can come to lie in it, and it can be read.
        self._held = [t.detach() for t in self._tensors]
        readable = [t for t in self._held if _is_readable(t)]
        self._are_all_readable = len(readable) == len(self._held)
        # A checksum costs 0.1 us a KB: only where somebody trains, and only to tell whose weights a step has changed.
        described = [_in_memory(t) for t in readable if not _is_index(t)]
        self._contents = _C.Contents(described, _MAX_ELEMENTS, with_checksum=self._step > 0)

    def _add_contents(self, module: nn.Module) -> None:
        # Buffers include the number of batches: it counts, which batch_norm does not, when the statistics move.
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                self._look_up(tensors, name, t)
                if t is not None:
                    self._tensors.append(t)
        # In a parameter's place: weights that a network makes of others, and those of replicas.
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                self._look_up(module.__dict__, name, value)
                self._tensors.append(value)
        parts = module._modules
        self._children += (module._parameters, module._buffers, parts)
        for name, part in parts.items():
            self._look_up(parts, name, part)
            if part is not None:
                self._add_part(part)

    def _add_part(self, part: nn.Module) -> None:
        own = part.__dict__
        self._modules.append(part)
        self._hooks += (own[name] for name in HOOKS)
        for name in _ATTRIBUTES:
            if name in own:
                self._look_up(own, name, own[name])
        self._add_contents(part)

    def _look_up(self, owner: dict[str, Any], name: str, found: Any) -> None:
        self._owners.append(owner)
        self._names.append(name)
        self._found.append(found)

    def holds(self, module: nn.Module) -> bool:
        """Whether this is the module's, not that of the one it was copied from, and nothing has changed."""
        assert _C is not None
        parameters, buffers, parts = self._own
        held: bool = (
            module._parameters is parameters
            and module._buffers is buffers
            and module._modules is parts
            and _C.same_emptiness(self._hooks, self._were_empty)
            and _C.same_modules(self._modules, self._classes, self._dictionaries, self._sizes)
            and _C.same_items(self._owners, self._names, self._found)
            # Addresses first: memory that a tensor has given up (by resizing its storage) must not be read.
            and _C.same_tensors(self._tensors, self._versions, self._addresses)
            and self._contents.sample_holds()
            and self._holds_after_steps()
        )
        return held

    def _holds_after_steps(self) -> bool:
        """Whether no optimiser has stepped, or only others' have."""
        assert _C is not None
        steps = _steps()
        if steps != self._step:
            if not (self._are_all_readable and self._contents.hold()):
                return False
            self._step = steps
        return True


def _is_readable(t: torch.Tensor) -> bool:
    return t.device.type == "cpu" and t.layout == torch.strided and type(t) is torch.Tensor


def _is_index(t: torch.Tensor) -> bool:
    """Which bias a pair of tokens has: one number a pair, and nobody trains it."""
    return t.dim() == 2 and not t.is_floating_point()


def _in_memory(t: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    return t.data_ptr(), tuple(t.shape), t.stride(), t.element_size()


class Folds(dict[Hashable, Any]):
    """What was computed from parameters, by name, or by name and what else it depends on; valid for the call that got
    it from :meth:`FoldCache._folds`."""

    def __init__(self, fingerprint: Fingerprint) -> None:
        super().__init__()
        self.fingerprint = fingerprint


def cached(folds: Folds | None, name: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` returns: from an earlier call if ``folds`` has it, else made, and kept there if there are any."""
    if folds is None:
        return make()
    if name in folds:
        return folds[name]
    made = make()
    while len(folds) >= MAX_ENTRIES:  # images of many sizes must not fill the memory
        folds.pop(next(iter(folds)), None)  # another thread may have been faster
    folds[name] = made
    return made


_KEY = "_effattn_fold_cache"


class FoldCache(nn.Module):
    """A module that caches what it computes from its parameters and parts, in evaluation without gradients.

    The cache is emptied by every change of what it was made of that :class:`Fingerprint` knows of, by a change of mode,
    and by every call that does not use it: with gradients, in training mode, traced. What goes unseen is a
    write through ``.data`` in evaluation mode that leaves the compared elements as they are, and on other devices
    than the CPU any write through ``.data``; ``module.eval()`` empties the cache after it.
    """

    def _folds(self) -> Folds | None:
        """To be called once a forward: the cached ones if nothing has changed, else new ones; None if none are kept."""
        if torch.compiler.is_compiling():
            return None
        # What a parametrization makes of the module's own table is known to its code alone.
        if torch.is_grad_enabled() or self.training or "parametrizations" in self._modules or not _is_plain_call():
            invalidate(self)
            return None
        folds: Folds | None = self.__dict__.get(_KEY)
        if folds is not None and folds.fingerprint.holds(self):
            return folds
        try:
            folds = Folds(Fingerprint(self))
        except RuntimeError:  # inference tensors
            invalidate(self)
            return None
        self.__dict__[_KEY] = folds
        return folds

    def _apply(self, fn: Any, recurse: bool = True) -> FoldCache:
        invalidate(self)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> FoldCache:
        invalidate(self)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _KEY}


def _is_plain_call() -> bool:
    """Not one whose tensors belong to a tracer, a mode (fake tensors) or a level of forward mode."""
    return (
        _C is not None
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0  # a dual number has its primal's address
        and not torch._C._are_functorch_transforms_active()
    )


def invalidate(module: nn.Module) -> None:
    """Empties the cache of a :class:`FoldCache`."""
    module.__dict__.pop(_KEY, None)
