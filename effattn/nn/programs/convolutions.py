"""Blocks of convolutions that several networks have, under the names of timm and of the official repositories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from effattn.nn.programs.emit import Emitter, Unknown, only_parts

Emit = Callable[[Emitter, Any, int], int]


def parts_in_order(*names: str) -> Emit:
    """Of a module whose forward calls these parts one after the other."""

    def emit(emitter: Emitter, module: Any, value: int) -> int:
        only_parts(module, *names)
        return emitter.parts(module, value, *names)

    return emit


def one_of(*choices: tuple[str, Emit]) -> Emit:
    """Of a name that several networks have: by a part that only one of them has."""

    def emit(emitter: Emitter, module: Any, value: int) -> int:
        for name, choice in choices:
            if name in module._modules:
                return choice(emitter, module, value)
        raise Unknown(f"none of {', '.join(name for name, _ in choices)} is a part of it")

    return emit


def residual(name: str) -> Emit:
    """Of x plus a part of it; dropped as a whole in training alone."""

    def emit(emitter: Emitter, module: Any, value: int) -> int:
        only_parts(module, name)
        if not emitter.shapes_only and module.training and module.drop:
            raise Unknown("it drops its part")
        return emitter.add(emitter.part(module, name, value), value)

    return emit


def _residual_block(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "pre_norm", "main", "shortcut", "post_act")
    parts = module._modules
    for name in ("pre_norm", "post_act"):
        if type(parts.get(name)) not in (nn.Identity, type(None)):
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


def _squeeze_excite(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "fc1", "bn", "act", "fc2", "gate")
    if module.add_maxpool:
        raise Unknown("it adds a maximum")
    builder = emitter.builder
    gate = emitter.parts(module, builder.step("mean", (value,)), "fc1", "bn", "act", "fc2", "gate")
    return builder.step("multiply", (value, gate))


EMITTERS: dict[str, Emit] = {
    # timm.layers has the norm and the activation in one.
    "ConvNormAct": one_of(
        ("norm", parts_in_order("dropout", "conv", "norm", "act")), ("bn", parts_in_order("conv", "bn", "aa"))
    ),
    "ConvLayer": parts_in_order("dropout", "conv", "norm", "act"),
    "ConvNorm": parts_in_order("conv", "bn"),
    "DSConv": parts_in_order("depth_conv", "point_conv"),
    "MBConv": parts_in_order("inverted_conv", "depth_conv", "point_conv"),
    "FusedMBConv": parts_in_order("spatial_conv", "point_conv"),
    "ConvBlock": parts_in_order("conv1", "conv2"),
    "ResBlock": parts_in_order("conv1", "conv2"),
    "ResidualBlock": _residual_block,
    "SEModule": _squeeze_excite,
}
