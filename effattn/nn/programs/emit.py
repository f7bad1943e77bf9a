"""From modules to programs.

An emitter puts what a module computes behind a value of a program and returns the value that it makes; it raises
:class:`Unknown` for a module that has anything that a program cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from effattn.nn.origin import is_genuine, original_class, tried
from effattn.nn.programs.builder import Builder
from effattn.nn.projection import fold_batch_norm, is_affine, is_batch_norm, is_dense, is_overridden, is_plain
from effattn.ops._packed import CHANNELS
from effattn.ops.block import Block

#: Whose classes are what their names say.
MODULES = (
    "timm.models.efficientvit_mit",
    "timm.models.efficientvit_msra",
    "timm.models.efficientformer",
    "timm.models.efficientformer_v2",
    "timm.layers",
)

#: kMaxKernel of csrc/cpu/block_program.cpp.
_MAX_KERNEL = 31

_ACTIVATIONS = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
}
#: timm's, by name.
_ACTIVATIONS_OF_TIMM = {"GELUTanh": "gelu_tanh", "GELU": "gelu", "Sigmoid": "sigmoid"}


class Unknown(Exception):
    """Why a module is no program."""


class Emitter:
    """A program in the making.

    Args:
        channels: of the image.
        emitters: by the name of the class of a module.
        shapes_only: whether it is asked what there is, whatever mode, dtype and device it is in; weights are then on
            the meta device, and not packed.
    """

    def __init__(
        self,
        channels: int,
        emitters: Mapping[str, Callable[[Emitter, Any, int], int]],
        *,
        shapes_only: bool = False,
    ) -> None:
        self.builder = Builder(channels)
        self.shapes_only = shapes_only
        #: Whether the module's tensors are (B, N, C) from here on.
        self.are_tokens = False
        self._emitters = emitters

    # --- modules --------------------------------------------------------------------------------------------

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
        if cls is nn.Conv2d:
            return self.convolution(value, module)
        if cls.forward is nn.Sequential.forward:
            return self.in_order(module, value)
        name = _activation_name(module)
        if name is not None:
            return self.activate(value, name)
        if isinstance(module, nn.Dropout | nn.Dropout2d) or cls.__name__ == "DropPath":
            self._require_idle(module)
            return value
        emitter = self._emitters.get(cls.__name__)
        if emitter is None:
            raise Unknown(f"{cls.__name__} is not known")
        if not is_trusted(cls):
            raise Unknown(f"{cls.__name__} of {cls.__module__} is not known")
        return emitter(self, module, value)

    def part(self, module: nn.Module, name: str, value: int) -> int:
        """A part of a module; one that is not there changes nothing."""
        part = module._modules.get(name)
        return value if part is None else _named(name, lambda: self.emit(part, value))

    def in_order(self, module: nn.Module, value: int) -> int:
        """Parts that are called one after the other."""
        if not module._modules:
            raise Unknown("it is empty")
        only_parts(module, *module._modules)
        return self.parts(module, value, *module._modules)

    def parts(self, module: nn.Module, value: int, *names: str) -> int:
        """These parts in order; a norm goes with the convolution in front of it."""
        left = [name for name in names if module._modules.get(name) is not None]
        while left:
            name, *left = left
            norm: Any = module._modules[left[0]] if left else None
            if type(module._modules[name]) is nn.Conv2d and norm is not None and _is_norm(norm):
                value = _named(name, partial(self.convolution, value, module._modules[name], norm))
                left = left[1:]
            else:
                value = self.part(module, name, value)
        return value

    # --- steps ----------------------------------------------------------------------------------------------

    def convolution(self, value: int, conv: Any, norm: Any = None, act: Any = None) -> int:
        """A convolution, the norm and the activation behind it."""
        weight, bias = self.folded(conv, norm)
        if conv.in_channels != self.builder.channels(value):
            raise Unknown(f"{conv.in_channels} input channels, where there are {self.builder.channels(value)}")
        options = {"stride": conv.stride[0], "padding": conv.padding[0], "groups": conv.groups}
        out = self.builder.convolution(value, weight, bias, **options)
        if type(norm).__name__ == "BatchNormAct2d":
            out = self.part(norm, "act", self.part(norm, "drop", out))
        return out if act is None else self.emit(act, out)

    def linear(self, value: int, linear: Any) -> int:
        """A linear layer of every pixel."""
        if not is_plain(linear, nn.Linear) or not is_dense(linear.weight):
            raise Unknown(f"{type(linear).__name__} is no plain Linear")
        weight, bias = self.weight(linear.weight), linear.bias
        if linear.in_features != self.builder.channels(value):
            raise Unknown(f"{linear.in_features} inputs, where there are {self.builder.channels(value)}")
        bias = None if bias is None else self.weight(bias)
        return self.builder.convolution(value, weight.unsqueeze(-1).unsqueeze(-1), bias)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """A parameter as the builder gets it."""
        return torch.empty_like(t, device="meta") if self.shapes_only else t

    def folded(self, conv: Any, norm: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a convolution with the norm behind it."""
        why_not = why_not_convolution(conv)
        if why_not is not None:
            raise Unknown(why_not)
        if norm is not None and not _is_norm(norm):
            raise Unknown(f"{type(norm).__name__} is no BatchNorm")
        if self.shapes_only:
            return self.weight(conv.weight), torch.empty(conv.out_channels, device="meta")
        if norm is not None and (norm.training or getattr(norm, "running_mean", 0) is None) and not is_affine(norm):
            raise Unknown("a BatchNorm takes the statistics of its batch")
        return fold_batch_norm(conv, norm, rounded=False)

    def folded_part(self, part: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The convolution of a part that is one, with or without a norm; its weight and bias."""
        if type(part) is nn.Conv2d:
            return part, *self.folded(part)
        if part is None or is_overridden(part):
            raise Unknown(f"{type(part).__name__} is no plain convolution")
        cls, parts = original_class(part), list(part._modules.values())
        in_order = cls.forward is nn.Sequential.forward or (
            cls.__name__ in ("ConvNorm", "_ConvNorm") and is_trusted(cls)
        )
        if not in_order or not 1 <= len(parts) <= 2 or type(parts[0]) is not nn.Conv2d:
            raise Unknown(f"{cls.__name__} is not a convolution and a norm")
        only_parts(part, *part._modules)
        return parts[0], *self.folded(*parts)

    def activate(self, value: int, name: str) -> int:
        """An activation of a value."""
        if not self.builder.activate(value, name):
            raise Unknown(f"{name} is not behind a convolution")
        return value

    def scale(self, value: int, module: Any) -> int:
        """A layer scale."""
        if isinstance(module, nn.Identity) or module is None:
            return value
        if type(module).__name__ not in ("LayerScale", "LayerScale2d") or not is_genuine(type(module)):
            raise Unknown(f"{type(module).__name__} is no layer scale")
        if is_overridden(module) or not self.builder.scale(value, self.weight(module.gamma)):
            raise Unknown("a layer scale is not behind a convolution")
        return value

    def add(self, value: int, residual: int) -> int:
        """The sum of two values."""
        if self.builder.channels(value) != self.builder.channels(residual):
            raise Unknown("the shortcut has other channels")
        if not self.builder.add(value, residual):
            raise Unknown("a shortcut around what does not end in a convolution")
        return value

    def _require_idle(self, module: Any) -> None:
        if is_overridden(module):
            raise Unknown("a dropout has hooks")
        drops = getattr(module, "p", getattr(module, "drop_prob", 1))
        if not self.shapes_only and module.training and drops:
            raise Unknown("a dropout drops")


def is_trusted(cls: type[nn.Module]) -> bool:
    """Whether a class with the name of a known one computes what that does: it is that, or was tried."""
    is_row = cls.forward is nn.Sequential.forward
    module = cls.__module__ if is_row else getattr(cls.forward, "__globals__", {}).get("__name__", "")
    return module.startswith((*MODULES, "effattn.")) or cls in tried


def _is_norm(module: Any) -> bool:
    if type(module).__name__ == "BatchNormAct2d" and is_genuine(type(module)) and not is_overridden(module):
        return True  # timm's: a norm with an activation behind it
    return is_batch_norm(module)


def _named(name: str, emit: Callable[[], int]) -> int:
    try:
        return emit()
    except Unknown as error:
        raise Unknown(f"{name}: {error}") from None


def only_parts(module: nn.Module, *names: str, tensors: tuple[str, ...] = ()) -> None:
    """Checks that a module has these parts at most, and of its own no tensors but these."""
    for name, part in module._modules.items():
        if part is not None and name not in names:
            raise Unknown(f"unknown part {name}")
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None and name not in tensors:
            raise Unknown(f"unknown tensor {name}")


def why_not_convolution(conv: Any) -> str | None:
    """Why a program has no such convolution; None if it has."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is no Conv2d"
    if is_overridden(conv):
        return "it has hooks, or a forward of its own"
    side = conv.kernel_size[0]
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    by_group = conv.in_channels == conv.out_channels and conv.in_channels // conv.groups % CHANNELS == 0
    for fits, text in (
        (is_dense(conv.weight), f"a weight of {type(conv.weight).__name__}"),
        (conv.kernel_size == (side, side) and side <= _MAX_KERNEL, f"kernel_size {conv.kernel_size}"),
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


def _activation_name(module: nn.Module) -> str | None:
    """A program's name for an activation; None for other modules."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if type(module).__name__ in _ACTIVATIONS_OF_TIMM and is_genuine(type(module)):
        return _ACTIVATIONS_OF_TIMM[type(module).__name__]
    return _ACTIVATIONS.get(type(module))


def _input_channels(module: nn.Module) -> int:
    """Of the first part that says."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels
        heads = getattr(part, "num_heads", None)
        if isinstance(heads, int) and "qkvs" in part._modules:  # a cascade, whose convolutions take a head's channels
            return heads * _input_channels(part._modules["qkvs"])
    raise Unknown("it has no convolution")


def make_program(
    module: nn.Module, emitters: Mapping[str, Callable[[Emitter, Any, int], int]], *, shapes_only: bool = False
) -> tuple[Block, bool]:
    """A module as a program with the weights that it has, and whether it returns (B, N, C) in place of an image.

    Raises:
        Unknown: if it is none.
    """
    channels = _input_channels(module)
    if not shapes_only and any(t.dtype != torch.float32 for t in module.parameters()):
        raise Unknown("its weights are not float32")
    emitter = Emitter(channels, emitters, shapes_only=shapes_only)
    if emitter.emit_itself(module, 0) == 0:
        raise Unknown("it does nothing")
    return emitter.builder.finish(with_weights=not shapes_only), emitter.are_tokens
