"""What the attention modules of EfficientViT (Microsoft), timm's or the official ones, are made of."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from effattn.integrations.structure import (
    Depthwise,
    Original,
    Pointwise,
    conv_norm,
    convolution_in,
    each,
    in_order,
    only,
    why_not_this_class,
)


def _group(module: Any) -> int:
    """Channels of a head, which are those of its values too."""
    return convolution_in(module.proj).in_channels // int(module.num_heads)


def _entries(module: Any) -> int:
    return int(module.attention_biases.shape[-1])


def _why_not_square(module: Any) -> str | None:
    shape = tuple(module.attention_biases.shape)
    square = math.isqrt(shape[1]) ** 2 == shape[1]
    return None if square else f"attention_biases of shape {shape}, not (heads, a square number)"


def _window(module: Any) -> tuple[int, ...]:
    side = math.isqrt(_entries(module))
    return 1, int(module.num_heads) * _group(module), side, side


CASCADE = Original(
    {
        "qkvs": each(
            conv_norm(lambda m: Pointwise(_group(m), 2 * m.key_dim + _group(m))), length=lambda m: m.num_heads
        ),
        "dws": each(conv_norm(lambda m: Depthwise(m.key_dim)), length=lambda m: m.num_heads),
        "proj": in_order(only(nn.ReLU), conv_norm(lambda m: Pointwise(m.num_heads * _group(m)))),
    },
    parameters={"attention_biases": lambda m: (m.num_heads, _entries(m))},
    buffers={"attention_bias_idxs": lambda m: (_entries(m), _entries(m))},
    attributes=("num_heads", "key_dim", "scale"),
    known=("ab", "attention_bias_cache", "attn_ratio", "d", "resolution", "training", "val_dim"),
    check=_why_not_square,
    example=_window,
)


def _cascade(root: Any, part: Any, name: str) -> str | None:
    if type(part).__name__ != "CascadedGroupAttention":
        return f"its {name} is {type(part).__name__}, not CascadedGroupAttention"
    reason = why_not_this_class(part) or CASCADE.why_not(part)
    return None if reason is None else f"its {name} cannot be replaced: {reason}"


def _image(module: Any) -> tuple[int, ...]:
    """The official one takes no other than its own."""
    return (*_window(module.attn)[:2], module.resolution, module.resolution)


WINDOWS = Original(
    {"attn": _cascade}, attributes=("window_resolution", "resolution"), known=("dim", "num_heads"), example=_image
)
