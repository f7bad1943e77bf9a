"""What the attention modules of EfficientFormer and EfficientFormerV2, timm's or Snap's own, are made of.

Snap's backbones for detection and segmentation have the same parts and a second table of biases, the one that counts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from effattn.integrations.structure import (
    Depthwise,
    Original,
    Pointwise,
    ShapeOf,
    any_module,
    conv_norm,
    convolution,
    convolution_in,
    in_order,
    linear,
    made_of,
    maybe,
    only,
)
from effattn.nn.arguments import pair
from effattn.nn.attention_bias import attention_bias_index
from effattn.nn.efficientformer import QUERIES, takes_every_other

_BIASES = ("attention_biases", "attention_bias_idxs")
_KNOWN = (
    *("N", "N2", "ab", "attention_bias_cache", "attn_ratio", "d", "dh", "key_attn_dim", "nh_kd", "out_dim"),
    *("resolution", "resolution2", "training", "val_attn_dim", "val_dim"),
)


def _table_of(keys: Any) -> ShapeOf:
    return lambda m: (m.num_heads, keys(m))


def _index_of(queries: Any, keys: Any) -> ShapeOf:
    return lambda m: (queries(m), keys(m))


def _for_dense_prediction(original: Original) -> Original:
    """With tables of classification, of any size, that its forward does not read."""
    table, index = original.parameters["attention_biases"], original.buffers["attention_bias_idxs"]
    left_over: dict[str, ShapeOf] = dict.fromkeys(_BIASES, lambda m: None)
    return replace(
        original,
        parameters={"attention_biases_seg": table, "attention_biases": left_over["attention_biases"]},
        buffers={"attention_bias_idxs_seg": index, **left_over},
    )


# --- EfficientFormer -------------------------------------------------------------------------------------------


def _why_not_of_a_square(module: Any) -> str | None:
    """Replaced modules know no resolution but their index's."""
    index = module.attention_bias_idxs
    side = math.isqrt(len(index))
    unknown = index.is_meta or type(index) is not torch.Tensor  # fakes have no values either
    if unknown or torch.equal(index, attention_bias_index((side, side), device=index.device)):
        return None
    return "attention_bias_idxs are not those of a square"


def _tokens(module: Any) -> int:
    return len(getattr(module, "attention_bias_idxs_seg", module.attention_bias_idxs))


def _outputs(module: Any) -> int:
    """Of q, k and v."""
    values = module.proj.in_features
    return 2 * int(module.num_heads * module.key_dim) + (values if values % module.num_heads == 0 else 0)


EFFICIENTFORMER = Original(
    {
        "qkv": linear(lambda m: m.proj.out_features, _outputs),
        "proj": linear(lambda m: None, lambda m: None),
    },
    parameters={"attention_biases": _table_of(_tokens)},
    buffers={"attention_bias_idxs": _index_of(_tokens, _tokens)},
    attributes=("num_heads", "key_dim", "scale"),
    known=_KNOWN,
    check=_why_not_of_a_square,
    example=lambda m: (1, _tokens(m), m.proj.out_features),
)
# Its map is gathered by whatever index there is.
EFFICIENTFORMER_DENSE = replace(_for_dense_prediction(EFFICIENTFORMER), check=lambda module: None)

# --- EfficientFormerV2 -----------------------------------------------------------------------------------------


def _dim(module: Any) -> int:
    return convolution_in(module.k).in_channels


def _keys(module: Any) -> int:
    return int(module.num_heads * module.key_dim)


def _values(module: Any) -> int:
    channels = convolution_in(module.v).out_channels
    return channels if channels % module.num_heads == 0 else 0


def _table(module: Any) -> int:
    return math.prod(pair(module.resolution))


def _halved_table(module: Any) -> int:
    return math.prod(-(-n // 2) for n in pair(module.resolution))


def _image(module: Any) -> tuple[int, ...]:
    """Of the size that the module was made for; the resolution is that behind a stride."""
    stride_conv = getattr(module, "stride_conv", None)
    stride = 1 if stride_conv is None else convolution_in(stride_conv).stride[0]
    return (1, _dim(module), *(stride * n for n in pair(module.resolution)))


def _v2(stride: int) -> dict[str, Any]:
    """Parts that both have."""
    return {
        "k": conv_norm(lambda m: Pointwise(_dim(m), _keys(m))),
        "v": conv_norm(lambda m: Pointwise(_dim(m), _values(m))),
        "v_local": conv_norm(lambda m: Depthwise(_values(m), stride)),
        "act": maybe(any_module),
        # The official repository has the activation in it.
        "proj": conv_norm(lambda m: Pointwise(_values(m)), in_front=lambda m: 0 if "act" in m._modules else 1),
    }


_TALKING_HEADS = convolution(lambda m: Pointwise(m.num_heads, m.num_heads))


def _stride_conv(root: Any, part: Any, name: str) -> str | None:
    conv = convolution_in(part)
    return conv_norm(lambda m: Depthwise(_dim(m), conv.stride[0], 3))(root, part, name)


def _why_not_its_stride(module: Any) -> str | None:
    stride_conv, upsample = module.stride_conv, module.upsample
    if stride_conv is None and upsample is None:
        return None
    if stride_conv is None or upsample is None:
        return "it has one of stride_conv and upsample without the other"
    factor, stride = upsample.scale_factor, convolution_in(stride_conv).stride
    if upsample.mode != "bilinear" or upsample.align_corners or upsample.size is not None:
        return "upsample is not bilinear with align_corners=False"
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    return None if tuple(factors) == stride else f"upsample by {factor} behind a stride of {stride}"


V2 = Original(
    {
        "q": conv_norm(lambda m: Pointwise(_dim(m), _keys(m))),
        **_v2(stride=1),
        "talking_head1": _TALKING_HEADS,
        "talking_head2": _TALKING_HEADS,
        "stride_conv": maybe(_stride_conv),
        "upsample": maybe(only(nn.Upsample)),
    },
    parameters={"attention_biases": _table_of(_table)},
    buffers={"attention_bias_idxs": _index_of(_table, _table)},
    attributes=("num_heads", "key_dim", "scale", "resolution"),
    known=_KNOWN,
    optional=("act",),
    check=_why_not_its_stride,
    example=_image,
)
V2_DENSE = _for_dense_prediction(V2)


def _pool(root: Any, part: Any, name: str) -> str | None:
    reason = only(nn.AvgPool2d)(root, part, name)
    return reason or (None if takes_every_other(part) else f"{name} does not take every other pixel")


def _local(root: Any, part: Any, name: str) -> str | None:
    """The official one is alone in a Sequential."""
    check = convolution(lambda m: Depthwise(_dim(m), 2, 3))
    return (check if isinstance(part, nn.Conv2d) else in_order(check))(root, part, name)


V2_DOWNSAMPLE = Original(
    {
        "q": made_of(
            QUERIES,
            {"pool": _pool, "local": _local, "proj": conv_norm(lambda m: Pointwise(_dim(m), _keys(m)))},
        ),
        **_v2(stride=2),
    },
    parameters={"attention_biases": _table_of(_table)},
    buffers={"attention_bias_idxs": _index_of(_halved_table, _table)},
    attributes=("num_heads", "key_dim", "scale", "resolution"),
    known=_KNOWN,
    optional=("act",),
    example=_image,
)
V2_DOWNSAMPLE_DENSE = _for_dense_prediction(V2_DOWNSAMPLE)
