"""1x1 convolutions around the operators: as matrix products, with the BatchNorm behind them folded in.

And what is computed from parameters alone is kept for the next call, for as long as the parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional


class _Kept(NamedTuple):
    state: list[Any]
    held: list[torch.Tensor]
    derived: Any


class KeepsDerived(nn.Module):
    """A module that keeps what is computed from its parts, in evaluation without gradients.

    It is made anew after anything that changes their parameters and buffers in a way torch counts (loading, an
    optimiser's step, conversions), after a part is exchanged or hooked, after a change of mode, and after a call with
    gradients, since torch's fused optimisers do not count; only writing to ``.data`` in evaluation mode goes unseen.
    """

    def _derived(self, name: str, parts: Iterable[nn.Module | None], make: Callable[[], Any]) -> Any:
        """What ``make`` returns, from the last call if the parts that it depends on are the same."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return make()
        if torch.is_grad_enabled():
            forget_derived(self)
            return make()
        if forward_ad._current_level >= 0:  # a dual number has its primal's address
            return make()
        kept: dict[str, _Kept] = self.__dict__.setdefault("_effattn_derived", {})
        present = [part for part in parts if part is not None]
        state: list[Any] = []
        try:
            for part in present:
                _add_state(part, state)
        except RuntimeError:  # inference tensors count no versions
            kept.pop(name, None)
            return make()
        if name not in kept or kept[name].state != state:
            # The sources' memory is held on to, so that no tensor that follows them can come to lie in it.
            held = [t.detach() for part in present for t in (*part.parameters(), *part.buffers())]
            kept[name] = _Kept(state, held, make())
        return kept[name].derived

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


def _add_state(module: nn.Module, state: list[Any]) -> None:
    own = module.__dict__  # looked up directly: at 14x14 tokens the searches of nn.Module show
    state.append((module, module.__class__, own["training"], own.get("eps"), is_overridden(module)))
    # Buffers include the number of batches: it counts, which batch_norm does not, when the statistics move.
    for tensors in own["_parameters"], own["_buffers"]:
        if tensors:
            for t in tensors.values():
                state.append(None if t is None else t.data_ptr())
                state.append(None if t is None else t._version)
    if own["_modules"]:
        for part in own["_modules"].values():
            if part is not None:
                _add_state(part, state)


def is_overridden(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: it has hooks, or a forward of its own."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def is_plain(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a module's weights can be used in place of calling it: no subclass, nothing that listens."""
    return type(module) is cls and not is_overridden(module)


def can_fold(norm: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether the norm is an affine map of numbers that do not depend on the input, and nobody needs gradients."""
    return (
        isinstance(norm, nn.BatchNorm2d)
        and is_plain(norm, nn.BatchNorm2d)
        and not norm.training
        and norm.running_mean is not None
        and not torch.is_grad_enabled()
    )


def fold_batch_norm(projection: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one projection that does what both do in evaluation; differentiable."""
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
    return weight.to(projection.weight.dtype), shift.to(projection.weight.dtype)


def pointwise_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 1x1 convolution as whichever is fastest: a matrix product, but for training on batches in NCHW.

    Args:
        x: (B, C, H, W).
        weight: (C_out, C, 1, 1) of a convolution, or (C_out, C) of a linear layer.
        bias: (C_out,), or None.

    Returns:
        (B, C_out, H, W), of x's memory format.
    """
    batch, channels, height, width = x.shape
    matrix = weight.flatten(1)
    if torch._C._are_functorch_transforms_active():
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
    return out.reshape(batch, len(weight), height, width)
