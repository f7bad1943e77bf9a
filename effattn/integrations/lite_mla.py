"""What makes a LiteMLA of timm or of the official repository one that :class:`effattn.nn.LiteMLA` can replace."""

from __future__ import annotations

import torch
from torch import nn


def why_not(module: nn.Module) -> str | None:
    """Why this module, of a class named LiteMLA, cannot be replaced; None if it can."""
    missing = [name for name in ("qkv", "aggreg", "proj", "kernel_func", "dim", "eps") if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if not isinstance(module.kernel_func, nn.ReLU):
        return f"its kernel function is {type(module.kernel_func).__name__}, not ReLU"
    return _why_not_aggregation(module)


def _why_not_aggregation(module: nn.Module) -> str | None:
    for i, pair in enumerate(module.aggreg):
        at = f"aggreg.{i}"
        if not isinstance(pair, nn.Sequential) or len(pair) != 2 or any(type(conv) is not nn.Conv2d for conv in pair):
            return f"{at} is not a pair of convolutions"
        depthwise, pointwise = pair
        channels, kernel = depthwise.in_channels, depthwise.kernel_size[0]
        if channels % (3 * module.dim) != 0:
            return f"{at} has {channels} channels, not a multiple of 3 * dim = {3 * module.dim}"
        fits = (
            depthwise.out_channels == depthwise.groups == channels
            and depthwise.kernel_size == (kernel, kernel)
            and kernel % 2 == 1
            and depthwise.padding in ((kernel // 2, kernel // 2), "same")
            and depthwise.padding_mode == "zeros"
            and depthwise.stride == depthwise.dilation == (1, 1)
        )
        if not fits:
            return f"{at}.0 is not a depthwise convolution of an odd kernel that keeps the size"
        fits = (
            pointwise.in_channels == pointwise.out_channels == channels
            and pointwise.groups == channels // module.dim
            and pointwise.kernel_size == pointwise.stride == (1, 1)
            and pointwise.padding in ((0, 0), "same", "valid")
        )
        if not fits:
            return f"{at}.1 is not a 1x1 convolution in groups of dim = {module.dim} channels"
    hooked = [
        name
        for name, part in module.named_modules()
        if name and (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks)
    ]
    return f"its parts have hooks, which would not run: {', '.join(hooked)}" if hooked else None
