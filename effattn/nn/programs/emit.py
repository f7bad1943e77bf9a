"""From modules to programs.

An emitter puts what a module computes behind a value of a program and returns the value that it makes; it raises
:class:`Unknown` for a module that has anything that a program cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from effattn.nn.origin import is_genuine, original_class, tried
from effattn.nn.projection import fold_batch_norm, is_affine, is_batch_norm, is_dense, is_overridden, is_plain
from effattn.ops.block import Block, Builder


class Unknown(Exception):
    """Why a module is no program."""


class Emitter:
    """A program in the making.

    Args:
        channels: of the image.
        emitters: by the name of the class of a module.
        shapes_only: whether it is asked what there is, whatever mode, dtype and device it is in; the weights are then
            on the meta device.
    """

    def __init__(
        self,
        channels: int,
        emitters: Mapping[str, Callable[[Emitter, Any, int], int]],
        *,
        shapes_only: bool = False,
    ) -> None:
        self.builder = Builder(channels)
        self._emitters = emitters
        self._shapes_only = shapes_only

    def emit(self, module: nn.Module, value: int) -> int:
        """Any known module.

        Raises:
            Unknown: if it is not.
        """
        if is_overridden(module):
            raise Unknown("it has hooks, or a forward of its own")
        return self.emit_itself(module, value)

    def emit_itself(self, module: nn.Module, value: int) -> int:
        """A module whose hooks run around the program."""
        cls = original_class(module)
        if cls is nn.Identity:
            return value
        if cls.forward is nn.Sequential.forward:
            return self.in_order(module, value)
        return self._emitter_of(cls)(self, module, value)

    def _emitter_of(self, cls: type[nn.Module]) -> Callable[[Emitter, Any, int], int]:
        emitter = self._emitters.get(cls.__name__)
        if emitter is None:
            raise Unknown(f"{cls.__name__} is not known")
        if not is_trusted(cls):
            raise Unknown(f"{cls.__name__} of {cls.__module__} is not known")
        return emitter

    def part(self, module: nn.Module, name: str, value: int) -> int:
        """A part of a module; one that is not there changes nothing."""
        part = module._modules.get(name)
        return value if part is None else _named(name, lambda: self.emit(part, value))

    def in_order(self, module: nn.Module, value: int) -> int:
        """Parts that are called one after the other."""
        if not module._modules:
            raise Unknown("it is empty")
        only_parts(module, *module._modules)
        for name in module._modules:
            value = self.part(module, name, value)
        return value

    def convolution(self, value: int, conv: Any, norm: nn.Module | None = None, act: nn.Module | None = None) -> int:
        """A convolution, the norm and the activation behind it."""
        weight, bias = self.folded(conv, norm)
        if conv.in_channels != self.builder.channels(value):
            raise Unknown(f"{conv.in_channels} input channels, where there are {self.builder.channels(value)}")
        return self.builder.convolution(
            value,
            weight,
            bias,
            stride=conv.stride[0],
            padding=conv.padding[0],
            groups=conv.groups,
            activation=activation(act),
        )

    def folded(self, conv: Any, norm: nn.Module | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a convolution with the norm behind it."""
        why_not = why_not_convolution(conv)
        if why_not is not None:
            raise Unknown(why_not)
        if not is_batch_norm(norm):
            raise Unknown(f"{type(norm).__name__} is no BatchNorm")
        if self._shapes_only:
            return torch.empty_like(conv.weight, device="meta"), torch.empty(conv.out_channels, device="meta")
        if not is_affine(norm):
            raise Unknown("a BatchNorm takes the statistics of its batch")
        return fold_batch_norm(conv, norm, rounded=False)

    def add(self, value: int, residual: int) -> int:
        """The sum of two values."""
        if self.builder.channels(value) != self.builder.channels(residual):
            raise Unknown("the shortcut has other channels")
        added = self.builder.add(value, residual)
        if added is None:
            raise Unknown("a shortcut around what does not end in a convolution")
        return added


#: Whose classes are what their names say.
MODULES = ("timm.models.efficientvit_mit",)


def is_trusted(cls: type[nn.Module]) -> bool:
    """Whether a class with the name of a known one computes what that does: it is that, or was tried."""
    module = getattr(cls.forward, "__globals__", {}).get("__name__", "")
    return module in MODULES or module.partition(".")[0] == "effattn" or cls in tried


def _named(name: str, emit: Callable[[], int]) -> int:
    try:
        return emit()
    except Unknown as error:
        raise Unknown(f"{name}: {error}") from None


def only_parts(module: nn.Module, *names: str) -> None:
    """Checks that a module has these parts at most, and no tensors of its own."""
    for owned in (module._modules, module._parameters, module._buffers):
        for name, value in owned.items():
            if value is not None and (owned is not module._modules or name not in names):
                raise Unknown(f"unknown {name}")


def why_not_convolution(conv: Any) -> str | None:
    """Why a program has no such convolution; None if it has."""
    if not is_plain(conv, nn.Conv2d):
        return f"{type(conv).__name__} is no plain Conv2d"
    side = conv.kernel_size[0]
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    by_group = conv.in_channels == conv.out_channels and conv.in_channels // conv.groups % 16 == 0
    for fits, text in (
        (is_dense(conv.weight), f"a weight of {type(conv.weight).__name__}"),
        (conv.kernel_size == (side, side) and side <= 31, f"kernel_size {conv.kernel_size}"),
        (conv.stride in ((1, 1), (2, 2)), f"stride {conv.stride}"),
        (conv.dilation == (1, 1), f"dilation {conv.dilation}"),
        (conv.padding_mode == "zeros", f"padding_mode {conv.padding_mode!r}"),
        (
            isinstance(conv.padding, tuple) and conv.padding[0] == conv.padding[1] < side,
            f"padding {conv.padding}",
        ),
        (conv.groups == 1 or depthwise or by_group, f"groups {conv.groups} of {conv.in_channels} channels"),
    ):
        if not fits:
            return text
    return None


def activation(act: nn.Module | None) -> str:
    """By a program's name for it."""
    if act is None:
        return "none"
    if not is_overridden(act):
        if type(act) in _ACTIVATIONS:
            return _ACTIVATIONS[type(act)]
        if type(act) is nn.GELU:
            return "gelu" if act.approximate == "none" else "gelu_tanh"
        if type(act).__name__ == "GELUTanh" and is_genuine(type(act)):  # timm's
            return "gelu_tanh"
    raise Unknown(f"activation {type(act).__name__}")


_ACTIVATIONS = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
}


def _first_convolution(module: nn.Module) -> nn.Conv2d | None:
    return next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)


def make_program(
    module: nn.Module, emitters: Mapping[str, Callable[[Emitter, Any, int], int]], *, shapes_only: bool = False
) -> Block:
    """A module as a program, with the weights that it has; see :class:`Emitter`.

    Raises:
        Unknown: if it is none.
    """
    first = _first_convolution(module)
    if first is None:
        raise Unknown("it has no convolution")
    if not shapes_only and any(t.dtype != torch.float32 for t in module.parameters()):
        raise Unknown("its weights are not float32")
    emitter = Emitter(first.in_channels, emitters, shapes_only=shapes_only)
    if emitter.emit_itself(module, 0) == 0:
        raise Unknown("it does nothing")
    return emitter.builder.finish()
