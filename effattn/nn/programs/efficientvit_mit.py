"""EfficientViT (MIT): the attention module, timm's and the official one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effattn.nn.programs.convolutions import Emit
from effattn.nn.programs.emit import Emitter, Unknown, only_parts
from effattn.nn.projection import is_depthwise, is_plain, is_pointwise
from effattn.ops._packed import of_whole_heads, rounded


def _lite_mla(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "qkv", "aggreg", "proj", "kernel_func")
    parts = module._modules
    kernel = parts.get("kernel_func")
    if kernel is not None and not is_plain(kernel, nn.ReLU):
        raise Unknown(f"kernel_func is {type(kernel).__name__}")
    dim, builder = module.dim, emitter.builder

    def whole(t: torch.Tensor) -> torch.Tensor:
        return of_whole_heads(t, len(t) // dim)

    def add(value: int, weight: torch.Tensor, bias: torch.Tensor, **options: Any) -> int:
        return builder.convolution(value, whole(weight), whole(bias), **options)

    qkv = add(value, *_projection(emitter, parts["qkv"], "qkv"))
    values = [qkv]
    for name, scale in parts["aggreg"]._modules.items():
        pair = list(scale._modules.values())
        if len(pair) != 2 or not all(is_plain(conv, nn.Conv2d) for conv in pair):
            raise Unknown(f"aggreg.{name} is not two convolutions")
        depthwise, pointwise = pair
        groups = pointwise.groups
        if not is_depthwise(depthwise) or not is_pointwise(pointwise, groups) or pointwise.in_channels != groups * dim:
            raise Unknown(f"aggreg.{name} is not a depthwise convolution and one of every head")
        mixed = add(qkv, *emitter.folded(depthwise), groups=builder.channels(qkv))
        weight, bias = emitter.folded(pointwise)
        values.append(add(mixed, whole(weight.transpose(0, 1)).transpose(0, 1), bias, groups=groups))
    channels = len(values) * builder.channels(qkv) // 3
    out = builder.step("linear_attention", values, channels=channels, head_dim=rounded(dim), eps=module.eps)
    weight, bias = _projection(emitter, parts["proj"], "proj")
    out = builder.convolution(out, whole(weight.transpose(0, 1)).transpose(0, 1), bias)
    return emitter.part(parts["proj"], "act", out)


def _projection(emitter: Emitter, part: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a 1x1 convolution with the norm behind it."""
    only_parts(part, "dropout", "conv", "norm", "act")
    conv, act = part._modules.get("conv"), part._modules.get("act")
    emitter.part(part, "dropout", 0)
    weight_and_bias = emitter.folded(conv, part._modules.get("norm"))
    if not is_pointwise(conv):
        raise Unknown(f"{name} is no 1x1 convolution")
    if name == "qkv" and type(act) not in (nn.Identity, type(None)):
        raise Unknown("qkv has an activation")
    return weight_and_bias


EMITTERS: dict[str, Emit] = {"LiteMLA": _lite_mla}
