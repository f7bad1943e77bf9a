"""What makes the attention modules of EfficientFormer and EfficientFormerV2 replaceable: timm's, and Snap's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from effattn.integrations.structure import (
    is_depthwise,
    is_pointwise,
    normed_convolution,
    why_not_its_own,
    why_not_its_parts,
    why_not_named,
)
from effattn.nn.attention_bias import attention_bias_index


def resembles(module: nn.Module) -> bool:
    """Whether a module of the common name Attention is EfficientFormer's at all. TinyViT's has a norm in front."""
    names = ("attention_biases", "attention_bias_idxs", "num_heads", "key_dim", "scale", "qkv", "proj")
    return why_not_named(module, names) is None and why_not_its_own(module, {"qkv", "proj"}) is None


def why_not(module: Any) -> str | None:
    """Why this EfficientFormer Attention cannot be replaced; None if it can."""
    qkv, proj, heads, key_dim = module.qkv, module.proj, module.num_heads, module.key_dim
    if type(qkv) is not nn.Linear or type(proj) is not nn.Linear:
        return f"qkv and proj are {type(qkv).__name__} and {type(proj).__name__}, not Linear"
    if qkv.out_features != 2 * heads * key_dim + proj.in_features or proj.in_features % heads != 0:
        return "qkv does not make q, k and v of its heads"
    index = module.attention_bias_idxs
    side = math.isqrt(len(index))
    if not index.is_meta and not torch.equal(index, attention_bias_index((side, side), device=index.device)):
        return "attention_bias_idxs are not those of a square"
    if module.attention_biases.shape[0] != heads:
        return f"attention_biases of shape {tuple(module.attention_biases.shape)} for {heads} heads"
    return why_not_its_parts(module)


def why_not_v2(module: Any) -> str | None:
    """Why this attention of EfficientFormerV2, at the image's own resolution or below, cannot be replaced."""
    names = ("q", "talking_head1", "talking_head2", "stride_conv", "upsample")
    reason = why_not_named(module, names) or _why_not_what_both_have(module, 1)
    if reason is not None:
        return reason
    if not is_pointwise(normed_convolution(module.q)):
        return "q is not a 1x1 convolution with a BatchNorm"
    reason = _why_not_its_stride(module.stride_conv, module.upsample)
    if reason is not None:
        return reason
    for name in ("talking_head1", "talking_head2"):
        conv = getattr(module, name)
        if type(conv) is not nn.Conv2d or not is_pointwise(conv):
            return f"{name} is not a 1x1 convolution"
    return why_not_its_parts(module)


def _why_not_its_stride(stride_conv: Any, upsample: Any) -> str | None:
    if stride_conv is None and upsample is None:
        return None
    if stride_conv is None or upsample is None:
        return "it has one of stride_conv and upsample without the other"
    conv = normed_convolution(stride_conv)
    if conv is None:
        return "stride_conv is not a convolution with a BatchNorm"
    factor = upsample.scale_factor
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    if type(upsample) is not nn.Upsample or upsample.mode != "bilinear" or upsample.align_corners:
        return "upsample is not bilinear with align_corners=False"
    return None if tuple(factors) == conv.stride else f"upsample by {factor} behind a stride of {conv.stride}"


def why_not_v2_downsample(module: Any) -> str | None:
    """Why this attention of EfficientFormerV2 that halves the resolution cannot be replaced; None if it can."""
    return (
        why_not_named(module, ("q",))
        or _why_not_what_both_have(module, 2)
        or _why_not_its_query(module.q)
        or why_not_its_parts(module)
    )


def _why_not_its_query(query: Any) -> str | None:
    reason = why_not_named(query, ("pool", "local", "proj"))
    if reason is not None:
        return f"q: {reason}"
    pool, (local, *others) = query.pool, [m for m in query.local.modules() if not isinstance(m, nn.Sequential)]
    if type(pool) is not nn.AvgPool2d or (pool.kernel_size, pool.stride, pool.padding) != (1, 2, 0):
        return "q.pool does not take every other pixel"
    if others or type(local) is not nn.Conv2d or not is_depthwise(local, local.in_channels, 2):
        return "q.local is not a depthwise convolution of stride 2"
    if local.kernel_size != (3, 3):
        return "q.local has no kernel of 3x3"
    return None if is_pointwise(normed_convolution(query.proj)) else "q.proj is not a 1x1 convolution with a BatchNorm"


def _why_not_what_both_have(module: Any, stride: int) -> str | None:
    names = (
        *("k", "v", "v_local", "proj", "attention_biases", "attention_bias_idxs"),
        *("num_heads", "key_dim", "scale", "resolution"),
    )
    known = {*names, "q", "act", "talking_head1", "talking_head2", "stride_conv", "upsample"}
    reason = why_not_named(module, names) or why_not_its_own(module, known)
    if reason is not None:
        return reason
    resolution, table = module.resolution, module.attention_biases
    tokens = math.prod(resolution) if isinstance(resolution, tuple) else resolution**2
    if tuple(table.shape) != (module.num_heads, tokens):
        return f"attention_biases of shape {tuple(table.shape)} for a resolution of {resolution}"
    activated = "act" not in module._modules
    if activated and (hasattr(module, "act") or len(list(module.proj.children())) != 3):
        return "its activation is no module"
    for name in ("k", "v", "proj"):
        if not is_pointwise(normed_convolution(getattr(module, name), activated=activated and name == "proj")):
            return f"{name} is not a 1x1 convolution with a BatchNorm"
    values = normed_convolution(module.v)
    if values is None or not is_depthwise(normed_convolution(module.v_local), values.out_channels, stride):
        return f"v_local is not a depthwise convolution of stride {stride} with a BatchNorm"
    return None
