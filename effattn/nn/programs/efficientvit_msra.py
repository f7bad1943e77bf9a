"""EfficientViT (Microsoft): cascaded group attention and the blocks around it, timm's and the official ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from effattn.nn.attention_bias import gather_attention_bias
from effattn.nn.programs.convolutions import Emit, parts_in_order, residual
from effattn.nn.programs.emit import Emitter, Unknown, only_parts
from effattn.nn.projection import is_depthwise, is_plain, is_pointwise
from effattn.ops._packed import CHANNELS


def bias_of(emitter: Emitter, module: Any, queries: int, keys: int) -> torch.Tensor:
    """(heads, queries, keys), gathered by the module's own index."""
    table, index = module.attention_biases, module.attention_bias_idxs
    if tuple(index.shape) != (queries, keys):
        raise Unknown(f"attention_bias_idxs of shape {tuple(index.shape)}, expected ({queries}, {keys})")
    if emitter.shapes_only:
        return torch.empty(len(table), queries, keys, device="meta")
    return gather_attention_bias(table, (queries, 1), (queries, 1), index=index)


def _cascade(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "qkvs", "dws", "proj", tensors=("attention_biases", "attention_bias_idxs"))
    heads, key_dim, builder = module.num_heads, module.key_dim, emitter.builder
    value_dim = builder.channels(value) // heads
    if value_dim * heads != builder.channels(value) or value_dim % CHANNELS != 0:
        raise Unknown(f"{heads} heads of {builder.channels(value)} channels, not of a multiple of {CHANNELS}")
    projections = [emitter.folded_part(part) for part in module.qkvs._modules.values()]
    convolutions = [emitter.folded_part(part) for part in module.dws._modules.values()]
    shape = (2 * key_dim + value_dim, value_dim)
    fit = [is_pointwise(conv) and tuple(weight.shape[:2]) == shape for conv, weight, _ in projections]
    fit += [is_depthwise(conv) and conv.in_channels == key_dim for conv, _, _ in convolutions]
    if len(fit) != 2 * heads or not all(fit):
        raise Unknown("qkvs and dws are not the convolutions of every head")
    relu, last = module.proj._modules.values() if len(module.proj._modules) == 2 else (None, None)
    if not is_plain(relu, nn.ReLU):
        raise Unknown("proj is not a ReLU and a convolution")
    side = math.isqrt(module.attention_biases.shape[1])
    weights = (
        torch.stack([weight.flatten(1) for _, weight, _ in projections]),
        torch.stack([bias for _, _, bias in projections]),
        *(weight for _, weight, _ in convolutions),
        torch.stack([bias for _, _, bias in convolutions]),
        bias_of(emitter, module, side * side, side * side),
    )
    out = builder.step(
        "cascade",
        (value,),
        weights,
        head_dim=key_dim,
        kernels=tuple(conv.kernel_size[0] for conv, _, _ in convolutions),
        window=(side, side),
        scale=float(module.scale),
        activation="relu",
    )
    return emitter.emit(last, out)


def _patch_merging(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "conv1", "act", "conv2", "se", "conv3")
    return emitter.parts(module, value, "conv1", "act", "conv2", "act", "se", "conv3")


EMITTERS: dict[str, Emit] = {
    "CascadedGroupAttention": _cascade,
    "LocalWindowAttention": parts_in_order("attn"),
    "ResidualDrop": residual("m"),
    "Residual": residual("m"),
    "PatchMerging": _patch_merging,
    "ConvMlp": parts_in_order("pw1", "act", "pw2"),
    "FFN": parts_in_order("pw1", "act", "pw2"),
}
