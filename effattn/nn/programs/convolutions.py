"""Blocks of convolutions that several networks have, under the names of timm and of the official repositories."""

from __future__ import annotations

from typing import Any

from torch import nn

from effattn.nn.projection import is_plain
from effattn.nn.programs.emit import Emitter, Unknown, only_parts


def _conv_norm_act(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "dropout", "conv", "norm", "act")
    parts = module._modules
    dropout = parts.get("dropout")
    if dropout is not None and not any(is_plain(dropout, kind) for kind in (nn.Dropout, nn.Dropout2d)):
        raise Unknown(f"dropout is {type(dropout).__name__}")
    if dropout is not None and dropout.training and getattr(dropout, "p", 1) > 0:
        raise Unknown("dropout drops")
    return emitter.convolution(value, parts.get("conv"), parts.get("norm"), parts.get("act"))


def parts_in_order(*names: str) -> Any:
    """Of a module whose forward calls these parts one after the other."""

    def emit(emitter: Emitter, module: Any, value: int) -> int:
        only_parts(module, *names)
        for name in names:
            value = emitter.part(module, name, value)
        return value

    return emit


def _residual_block(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "pre_norm", "main", "shortcut", "post_act")
    parts = module._modules
    for name in ("pre_norm", "post_act"):
        if type(parts.get(name, nn.Identity())) not in (nn.Identity, type(None)):
            raise Unknown(f"{name} is {type(parts[name]).__name__}")
    if parts.get("main") is None:
        return value
    out = emitter.part(module, "main", value)
    shortcut = parts.get("shortcut")
    if shortcut is None:
        return out
    if type(shortcut).__name__ not in ("Identity", "IdentityLayer"):
        raise Unknown(f"shortcut is {type(shortcut).__name__}")
    return emitter.add(out, value)


EMITTERS = {
    "ConvNormAct": _conv_norm_act,
    "ConvLayer": _conv_norm_act,
    "DSConv": parts_in_order("depth_conv", "point_conv"),
    "MBConv": parts_in_order("inverted_conv", "depth_conv", "point_conv"),
    "FusedMBConv": parts_in_order("spatial_conv", "point_conv"),
    "ConvBlock": parts_in_order("conv1", "conv2"),
    "ResBlock": parts_in_order("conv1", "conv2"),
    "ResidualBlock": _residual_block,
}
