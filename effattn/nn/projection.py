"""1x1 convolutions around the operators: as matrix products, with the BatchNorm behind them folded in.

And what is computed from parameters alone is kept for the next call, for as long as the parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from effattn._library import _C
from effattn._tracing import is_exporting_to_onnx

# torch's matrix products are MKL's, which leaves an AMD processor half of its vectors; its convolutions are oneDNN's.
_PRODUCTS_ARE_SLOW = _C is not None and _C.is_amd() and torch.backends.mkl.is_available()

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


#: What something is derived from: a module with all its parts, or named tensors.
Part: TypeAlias = nn.Module | dict[str, Any] | None


class _Watch:
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
        self._hooks += (own[name] for name in _HOOKS)
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
    watch: _Watch
    derived: Any


#: Derivations that a module keeps, by name and size of the image; the oldest goes first.
_MOST_KEPT = 8


class KeepsDerived(nn.Module):
    """A module that keeps what is computed from its parts, in evaluation without gradients.

    It is made anew after anything that changes their parameters and buffers in a way torch counts (loading, an
    optimiser's step, conversions), after a part is exchanged or hooked, after a change of mode, and after a call with
    gradients, since torch's fused optimisers do not count; only writing to ``.data`` in evaluation mode goes unseen.
    """

    def _derived(self, name: str, parts: Sequence[Part], make: Callable[[], Any]) -> Any:
        """What ``make`` returns, from the last call if what it depends on is the same.

        Args:
            parts: modules, and dictionaries of parameters of this one.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _C is None:
            return make()
        if torch._C._len_torch_dispatch_stack() > 0:  # fake tensors, tracing: what is made belongs there
            return make()
        if torch.is_grad_enabled():
            forget_derived(self)
            return make()
        if forward_ad._current_level >= 0:  # a dual number has its primal's address
            return make()
        all_kept: dict[str, _Kept] = self.__dict__.setdefault("_effattn_derived", {})
        kept = all_kept.get(name)
        if kept is not None and kept.watch.holds(parts):
            return kept.derived
        try:
            watch = _Watch(parts)
        except RuntimeError:  # inference tensors count no versions
            all_kept.pop(name, None)
            return make()
        derived = make()
        all_kept.pop(name, None)
        while len(all_kept) >= _MOST_KEPT:  # what is kept for images of many sizes must not fill the memory
            all_kept.pop(next(iter(all_kept)), None)  # another thread may have been faster
        all_kept[name] = _Kept(watch, derived)
        return derived

    def _folded(self, name: str, projection: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, ...]:
        """:func:`fold_batch_norm`, kept."""
        folded: tuple[torch.Tensor, ...] = self._derived(
            name, (projection, norm), lambda: fold_batch_norm(projection, norm)
        )
        return folded

    def _apply(self, fn: Any, recurse: bool = True) -> KeepsDerived:
        forget_derived(self)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> KeepsDerived:
        forget_derived(self)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_effattn_derived"}


def forget_derived(module: nn.Module) -> None:
    """Drops what :class:`KeepsDerived` kept."""
    module.__dict__.pop("_effattn_derived", None)


def is_autocast(x: torch.Tensor) -> bool:
    """The meta device knows no autocast and refuses to be asked."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def is_overridden(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: it has hooks, or a forward of its own."""
    own = module.__dict__
    return any(own[name] for name in _HOOKS) or "forward" in own


def is_plain(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a module's weights can be used in place of calling it: no subclass, nothing that listens."""
    return type(module) is cls and not is_overridden(module)


def is_dense(weight: torch.Tensor) -> bool:
    """Not one of the subclasses that quantise: those are used by the layers that have them."""
    if torch.compiler.is_compiling():  # fakes are subclasses too
        return not is_traceable_wrapper_subclass(weight)
    return type(weight) in (nn.Parameter, torch.Tensor)


# Whose own forward calls its parts one after the other: timm's, and those of effattn.nn.
_IN_ORDER = ("ConvNorm", "_ConvNorm")


def calls_in_order(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether calling a module is calling its parts one after the other, and nothing listens."""
    if module is None or is_overridden(module):
        return False
    return type(module).forward is nn.Sequential.forward or type(module).__name__ in _IN_ORDER


def can_fold(norm: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether the norm is an affine map of numbers that do not depend on the input, and nobody needs gradients."""
    return not torch.is_grad_enabled() and _is_affine(norm) and not is_exporting_to_onnx()


def _is_affine(norm: nn.Module | None) -> bool:
    return (
        isinstance(norm, nn.BatchNorm2d)
        and is_plain(norm, nn.BatchNorm2d)
        and not norm.training
        and norm.running_mean is not None
    )


def folded_pair(part: nn.Module | None, in_front: int = 0) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """The convolution at the end of a part and the BatchNorm behind it, or None where they cannot be folded.

    ``in_front``: how many modules stand in front of them (an activation), which must still be called. With gradients,
    :func:`fold_batch_norm` is one more differentiable step.
    """
    if is_exporting_to_onnx():  # runtimes fold them themselves, and know no weights but constants
        return None
    pair = convolution_and_norm(part, in_front)
    return pair if pair is not None and _is_affine(pair[1]) else None


def convolution_and_norm(part: nn.Module | None, in_front: int = 0) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """The last two of a part, where their tensors can be used in place of calling them."""
    if not calls_in_order(part):
        return None
    parts: list[Any] = list(part._modules.values())
    if len(parts) != 2 + in_front or not is_plain(parts[-2], nn.Conv2d) or not is_plain(parts[-1], nn.BatchNorm2d):
        return None
    return (parts[-2], parts[-1]) if is_dense(parts[-2].weight) else None


def fold_batch_norm(
    projection: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d, *, rounded: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one projection that does what both do in evaluation; differentiable.

    Of the projection's dtype; if not ``rounded``, of float32 at least.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    at_least = torch.promote_types(projection.weight.dtype, torch.float32)
    scale = (norm.running_var.to(at_least) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(at_least)
    shift = -norm.running_mean.to(at_least) * scale
    if projection.bias is not None:
        shift = shift + projection.bias.to(at_least) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(at_least)
    weight = projection.weight.to(at_least) * scale.reshape(-1, *(1 for _ in projection.weight.shape[1:]))
    dtype = projection.weight.dtype if rounded else at_least
    return weight.to(dtype), shift.to(dtype)


def _is_slow_as_product(x: torch.Tensor) -> bool:
    """Of narrow types both are oneDNN's; as convolutions they round as the stock module's do."""
    return _PRODUCTS_ARE_SLOW and x.dtype != torch.float64 and x.device.type == "cpu" and x.numel() > 0


def pointwise_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 1x1 convolution as whichever is fastest: a matrix product, but for training on batches in NCHW, and on AMD.

    Args:
        x: (B, C, H, W).
        weight: (C_out, C, 1, 1) of a convolution, or (C_out, C) of a linear layer.
        bias: (C_out,), or None.

    Returns:
        (B, C_out, H, W), of x's memory format.
    """
    if (not torch.compiler.is_compiling() and torch._C._is_tracing()) or is_exporting_to_onnx():
        # As one node, and for every batch size.
        return functional.conv2d(x, weight if weight.dim() == 4 else weight.unsqueeze(-1).unsqueeze(-1), bias)
    batch, channels, height, width = x.shape
    matrix = weight.flatten(1)
    if torch._C._are_functorch_transforms_active() or _is_slow_as_product(x):
        return functional.conv2d(x, matrix.unsqueeze(-1).unsqueeze(-1), bias)
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return functional.linear(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)
    grad = torch.is_grad_enabled()
    if x.numel() > 0 and (not x.is_contiguous() or (batch != 1 and grad)):
        return functional.conv2d(x, matrix.unsqueeze(-1).unsqueeze(-1), bias)
    if batch == 1:
        tokens = x.reshape(channels, height * width)
        out = torch.mm(matrix, tokens) if bias is None else torch.addmm(bias.unsqueeze(-1), matrix, tokens)
    else:
        tokens = x.reshape(batch, channels, height * width)
        out = torch.matmul(matrix, tokens)
        if bias is not None:
            out = out + bias.unsqueeze(-1) if grad else out.add_(bias.unsqueeze(-1))
    return out.reshape(batch, weight.shape[0], height, width)
