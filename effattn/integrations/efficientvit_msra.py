"""What makes the attention modules of EfficientViT (Microsoft), timm's or the official ones, replaceable."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from effattn.integrations.structure import (
    is_depthwise,
    is_pointwise,
    normed_convolution,
    why_not_its_own,
    why_not_its_parts,
    why_not_named,
)


def why_not_cascade(module: Any) -> str | None:
    """Why this CascadedGroupAttention cannot be replaced; None if it can."""
    names = ("qkvs", "dws", "proj", "attention_biases", "attention_bias_idxs", "num_heads", "key_dim", "scale")
    return (
        why_not_named(module, names)
        or why_not_its_own(module, {"qkvs", "dws", "proj"})
        or _why_not_its_heads(module)
        or why_not_its_parts(module)
    )


def _why_not_its_heads(module: Any) -> str | None:
    heads, key_dim, table = module.num_heads, module.key_dim, module.attention_biases
    if len(module.qkvs) != heads or len(module.dws) != heads:
        return f"{heads} heads with {len(module.qkvs)} qkvs and {len(module.dws)} dws"
    if table.dim() != 2 or table.shape[0] != heads or math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
        return f"attention_biases of shape {tuple(table.shape)}, not (heads, a square number)"
    if len(module.proj) != 2 or type(module.proj[0]) is not nn.ReLU:
        return "proj is not a ReLU and a convolution"
    proj = normed_convolution(module.proj[1])
    if proj is None or not is_pointwise(proj):
        return "proj is not a 1x1 convolution with a BatchNorm"
    channels = proj.in_channels // heads
    for i, (qkv, dw) in enumerate(zip(module.qkvs, module.dws, strict=True)):
        conv = normed_convolution(qkv)
        if conv is None or not is_pointwise(conv):
            return f"qkvs.{i} is not a 1x1 convolution with a BatchNorm"
        if conv.in_channels != channels or conv.out_channels != 2 * key_dim + channels:
            return f"qkvs.{i} does not make q, k and v of a group of channels"
        if not is_depthwise(normed_convolution(dw), key_dim):
            return f"dws.{i} is not a depthwise convolution of an odd kernel that keeps the size"
    return None


def why_not_windows(module: Any) -> str | None:
    """Why this LocalWindowAttention cannot be replaced; None if it can."""
    reason = why_not_named(module, ("attn", "window_resolution")) or why_not_its_own(module, {"attn"})
    if reason is not None:
        return reason
    if type(module.attn).__name__ != "CascadedGroupAttention":
        return f"its attn is {type(module.attn).__name__}, not CascadedGroupAttention"
    reason = why_not_cascade(module.attn)
    return None if reason is None else f"its attn cannot be replaced: {reason}"
