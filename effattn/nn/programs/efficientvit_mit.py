"""EfficientViT (MIT): the attention module and the blocks around it, timm's and the official ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effattn.nn.programs.convolutions import parts_in_order
from effattn.nn.programs.emit import Emitter, Unknown, activation, only_parts
from effattn.nn.projection import is_depthwise, is_plain, is_pointwise
from effattn.ops._packed import rounded


def _by_head(t: torch.Tensor, dim: int, padded_dim: int) -> torch.Tensor:
    """(parts * dim, ...) -> (parts * padded_dim, ...), zeros behind each part's channels."""
    parts = t.unflatten(0, (-1, dim))
    pad = t.new_zeros(len(parts), padded_dim - dim, *t.shape[1:])
    return torch.cat([parts, pad], dim=1).flatten(0, 1)


def _lite_mla(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "qkv", "aggreg", "proj", "kernel_func")
    parts = module._modules
    if not is_plain(parts.get("kernel_func"), nn.ReLU) and parts.get("kernel_func") is not None:
        raise Unknown(f"kernel_func is {type(parts['kernel_func']).__name__}")
    dim, builder = module.dim, emitter.builder
    whole = rounded(dim)

    def add(value: int, weight: torch.Tensor, bias: torch.Tensor | None, **options: Any) -> int:
        bias = None if bias is None else _by_head(bias, dim, whole)
        return builder.convolution(value, _by_head(weight, dim, whole), bias, **options)

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
        mixed = add(qkv, *emitter.folded(depthwise, None), groups=builder.channels(qkv))
        weight, bias = emitter.folded(pointwise, None)
        values.append(add(mixed, _inputs_by_head(weight, dim, whole), bias, groups=groups))
    out = builder.linear_attention(values, head_dim=whole, eps=module.eps)
    weight, bias = _projection(emitter, parts["proj"], "proj")
    act = activation(parts["proj"]._modules.get("act"))
    return builder.convolution(out, _inputs_by_head(weight, dim, whole), bias, activation=act)


def _inputs_by_head(weight: torch.Tensor, dim: int, padded_dim: int) -> torch.Tensor:
    return _by_head(weight.transpose(0, 1), dim, padded_dim).transpose(0, 1)


def _projection(emitter: Emitter, part: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a 1x1 convolution with the norm behind it."""
    only_parts(part, "dropout", "conv", "norm", "act")
    conv = part._modules.get("conv")
    weight_and_bias = emitter.folded(conv, part._modules.get("norm"))
    if not is_pointwise(conv):
        raise Unknown(f"{name} is no 1x1 convolution")
    if name == "qkv" and activation(part._modules.get("act")) != "none":
        raise Unknown("qkv has an activation")
    return weight_and_bias


EMITTERS = {
    "LiteMLA": _lite_mla,
    "EfficientVitBlock": parts_in_order("context_module", "local_module"),
    "EfficientViTBlock": parts_in_order("context_module", "local_module"),
    "EfficientVitStage": parts_in_order("blocks"),
    "EfficientVitLargeStage": parts_in_order("blocks"),
}
