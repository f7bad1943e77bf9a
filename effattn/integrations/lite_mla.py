"""What makes a LiteMLA of timm or of the official repository one that :class:`effattn.nn.LiteMLA` can replace."""

from __future__ import annotations

import torch
from torch import nn

from effattn.integrations.structure import is_depthwise, why_not_its_parts, why_not_named


def why_not(module: nn.Module) -> str | None:
    """Why this module, of a class named LiteMLA, cannot be replaced; None if it can."""
    reason = why_not_named(module, ("qkv", "aggreg", "proj", "kernel_func", "dim", "eps"))
    if reason is not None:
        return reason
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if type(module.kernel_func) is not nn.ReLU:
        return f"its kernel function is {type(module.kernel_func).__name__}, not ReLU"
    for i, pair in enumerate(module.aggreg):
        if not isinstance(pair, nn.Sequential) or len(pair) != 2:
            return f"aggreg.{i} is not a pair of convolutions"
        reason = why_not_a_scale(pair[0], pair[1], module.dim)
        if reason is not None:
            return f"aggreg.{i}: {reason}"
    return why_not_its_parts(module)


def why_not_a_scale(depthwise: nn.Module, pointwise: nn.Module, head_dim: int) -> str | None:
    """Why two modules are not the aggregation of a scale; None if they are."""
    if type(depthwise) is not nn.Conv2d or type(pointwise) is not nn.Conv2d:
        return f"expected two convolutions, got {type(depthwise).__name__} and {type(pointwise).__name__}"
    channels = depthwise.in_channels
    if channels % (3 * head_dim) != 0:
        return f"{channels} channels, not a multiple of 3 * {head_dim}"
    if not is_depthwise(depthwise, channels):
        return "the first is not a depthwise convolution of an odd kernel that keeps the size"
    fits = (
        pointwise.in_channels == pointwise.out_channels == channels
        and pointwise.groups == channels // head_dim
        and pointwise.kernel_size == pointwise.stride == (1, 1)
        and pointwise.padding in ((0, 0), "same", "valid")
    )
    return None if fits else f"the second is not a 1x1 convolution in groups of {head_dim} channels"
