"""EfficientFormer and EfficientFormerV2 of timm: the attention modules and the blocks around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effattn.nn.arguments import pair
from effattn.nn.programs.convolutions import Emit, parts_in_order
from effattn.nn.programs.efficientvit_msra import bias_of
from effattn.nn.programs.emit import Emitter, Unknown, only_parts
from effattn.nn.projection import is_depthwise, is_overridden, is_plain, is_pointwise
from effattn.ops._packed import of_whole_heads, rounded

_TABLES = ("attention_biases", "attention_bias_idxs")


class _Heads:
    """Projections to q, k and v of all heads, each head's channels padded for the operator."""

    def __init__(self, emitter: Emitter, module: Any) -> None:
        self.emitter, self.module, self.heads = emitter, module, int(module.num_heads)

    def project(self, value: int, *projections: tuple[torch.Tensor, torch.Tensor]) -> int:
        """weight (heads * dim, C, 1, 1) and bias (heads * dim,) of each, side by side."""
        weights, biases = zip(*projections, strict=True)
        return self.emitter.builder.convolution(
            value,
            torch.cat([of_whole_heads(weight, self.heads) for weight in weights]),
            torch.cat([of_whole_heads(bias, self.heads) for bias in biases]),
        )

    def attend(self, inputs: tuple[int, ...], value_dim: int, queries: int, keys: int, **options: Any) -> int:
        module, builder = self.module, self.emitter.builder
        bias = bias_of(self.emitter, module, queries, keys)
        mix = options.pop("mix", ())
        return builder.step(
            "attention",
            inputs,
            (bias, *mix),
            channels=self.heads * rounded(value_dim),
            heads=self.heads,
            head_dim=int(module.key_dim),
            value_dim=value_dim,
            queries=queries,
            keys=keys,
            scale=float(module.scale),
            talking_heads=int(bool(mix)),
            **options,
        )

    def project_back(self, value: int, weight: torch.Tensor, bias: torch.Tensor) -> int:
        """weight (C, heads * value_dim, 1, 1)."""
        columns = of_whole_heads(weight.transpose(0, 1), self.heads).transpose(0, 1)
        return self.emitter.builder.convolution(value, columns, bias)


# --- EfficientFormer -------------------------------------------------------------------------------------------


def _attention(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "qkv", "proj", tensors=_TABLES)
    if not emitter.are_tokens:
        raise Unknown("its input is no tokens")
    for name in ("qkv", "proj"):
        if not is_plain(getattr(module, name), nn.Linear) or getattr(module, name).bias is None:
            raise Unknown(f"{name} is no plain Linear with a bias")
    heads, key_dim = _Heads(emitter, module), int(module.key_dim)
    weight = emitter.weight(module.qkv.weight).unflatten(0, (heads.heads, -1))
    bias = emitter.weight(module.qkv.bias).unflatten(0, (heads.heads, -1))
    value_dim = weight.shape[1] - 2 * key_dim
    dims = [key_dim, key_dim, value_dim]
    parts = zip(weight.split(dims, dim=1), bias.split(dims, dim=1), strict=True)
    pairs = [(w.flatten(0, 1).unsqueeze(-1).unsqueeze(-1), b.flatten()) for w, b in parts]
    tokens = len(module.attention_bias_idxs)
    out = heads.attend((heads.project(value, *pairs),), value_dim, tokens, tokens)
    proj = emitter.weight(module.proj.weight).unsqueeze(-1).unsqueeze(-1)
    return heads.project_back(out, proj, emitter.weight(module.proj.bias))


def _layer_norm(emitter: Emitter, norm: Any, value: int) -> int:
    channels = emitter.builder.channels(value)
    if type(norm).__name__ != "LayerNorm" or not isinstance(norm, nn.LayerNorm) or is_overridden(norm):
        raise Unknown(f"{type(norm).__name__} is no plain LayerNorm")
    if tuple(norm.normalized_shape) != (channels,) or norm.weight is None or norm.bias is None:
        raise Unknown("a LayerNorm without weights, or of more than the channels")
    weights = (emitter.weight(norm.weight), emitter.weight(norm.bias))
    return emitter.builder.step("layer_norm", (value,), weights, eps=float(norm.eps))


def _meta_block_1d(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "norm1", "token_mixer", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    if not emitter.are_tokens:
        raise Unknown("its input is no tokens")
    out = emitter.part(module, "token_mixer", _layer_norm(emitter, module.norm1, value))
    out = emitter.part(module, "drop_path1", emitter.scale(out, module.ls1))
    value = emitter.add(out, value)
    out = emitter.part(module, "mlp", _layer_norm(emitter, module.norm2, value))
    out = emitter.part(module, "drop_path2", emitter.scale(out, module.ls2))
    return emitter.add(out, value)


def _mlp(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "fc1", "act", "drop1", "norm", "fc2", "drop2")
    if not emitter.are_tokens:
        raise Unknown("its input is no tokens")
    value = emitter.parts(module, emitter.linear(value, module.fc1), "act", "drop1", "norm")
    return emitter.part(module, "drop2", emitter.linear(value, module.fc2))


def _flat(emitter: Emitter, module: Any, value: int) -> int:
    emitter.are_tokens = True
    return value


def _pooled(emitter: Emitter, mixer: Any, scale: Any, value: int) -> int:
    """x + scale (pool(x) - x)"""
    pool: Any = mixer._modules.get("pool") if type(mixer).__name__ == "Pooling" and not is_overridden(mixer) else None
    if not is_plain(pool, nn.AvgPool2d):
        raise Unknown(f"token_mixer is {type(mixer).__name__}, not Pooling")
    kernel, stride, padding = (pair(n) for n in (pool.kernel_size, pool.stride, pool.padding))
    side = kernel[0]
    fits = kernel == (side, side) and side % 2 == 1 and stride == (1, 1) and padding == (side // 2, side // 2)
    if not fits or pool.count_include_pad or pool.ceil_mode or pool.divisor_override:
        raise Unknown("its pooling is not the mean of the pixels around")
    gamma = getattr(scale, "gamma", None)
    if gamma is None and not isinstance(scale, nn.Identity):
        raise Unknown(f"{type(scale).__name__} is no layer scale")
    ones = torch.ones(emitter.builder.channels(value), device="meta" if emitter.shapes_only else "cpu")
    factor = ones if gamma is None else emitter.weight(gamma)
    return emitter.builder.step("pool_mixer", (value,), (factor,), kernel=side)


def _meta_block_2d(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "token_mixer", "ls1", "drop_path1", "mlp", "ls2", "drop_path2")
    if emitter.are_tokens:
        raise Unknown("its input is no image")
    value = emitter.part(module, "drop_path1", _pooled(emitter, module.token_mixer, module.ls1, value))
    out = emitter.scale(emitter.part(module, "mlp", value), module.ls2)
    return emitter.add(emitter.part(module, "drop_path2", out), value)


# --- EfficientFormerV2 -----------------------------------------------------------------------------------------


def _v2_parts(emitter: Emitter, module: Any, *names: str) -> dict[str, tuple[Any, torch.Tensor, torch.Tensor]]:
    found = {name: emitter.folded_part(module._modules.get(name)) for name in names}
    for name, (conv, _, _) in found.items():
        if name != "v_local" and not is_pointwise(conv):
            raise Unknown(f"{name} is no 1x1 convolution")
    return found


def _attention_2d(emitter: Emitter, module: Any, value: int) -> int:
    names = ("q", "k", "v", "v_local", "proj")
    only_parts(module, *names, "talking_head1", "talking_head2", "act", "stride_conv", "upsample", tensors=_TABLES)
    heads = _Heads(emitter, module)
    if module.stride_conv is not None:
        value = emitter.part(module, "stride_conv", value)
    parts = _v2_parts(emitter, module, *names)
    q_and_k = heads.project(value, parts["q"][1:], parts["k"][1:])
    v = heads.project(value, parts["v"][1:])
    mix: list[torch.Tensor] = []
    for name in ("talking_head1", "talking_head2"):
        conv = getattr(module, name)
        weight, bias = emitter.folded(conv)
        if not is_pointwise(conv) or tuple(weight.shape[:2]) != (heads.heads, heads.heads):
            raise Unknown(f"{name} is no 1x1 convolution over the heads")
        mix += (weight.flatten(1), bias)
    tokens, value_dim = len(module.attention_bias_idxs), len(parts["v"][2]) // heads.heads
    local = _local(emitter, heads, parts["v_local"], v, 1)
    out = heads.attend((q_and_k, v), value_dim, tokens, tokens, mix=mix, addend=local)
    if module.upsample is not None:
        out = _upsample(emitter, module, out)
    out = emitter.part(module, "act", out)
    return heads.project_back(out, *parts["proj"][1:])


def _local(emitter: Emitter, heads: _Heads, part: Any, value: int, stride: int) -> int:
    """The depthwise convolution of the values."""
    conv, weight, bias = part
    if not is_depthwise(conv, stride):
        raise Unknown("v_local is no depthwise convolution")
    weight, bias = of_whole_heads(weight, heads.heads), of_whole_heads(bias, heads.heads)
    return emitter.builder.convolution(value, weight, bias, stride=stride, groups=len(weight))


def _upsample(emitter: Emitter, module: Any, value: int) -> int:
    upsample = module.upsample
    if module.stride_conv is None or not is_plain(upsample, nn.Upsample):
        raise Unknown("upsample without stride_conv")
    factor = upsample.scale_factor
    if upsample.mode != "bilinear" or upsample.align_corners or upsample.size is not None or factor not in (2, (2, 2)):
        raise Unknown("upsample is not bilinear, by two, with align_corners=False")
    return emitter.builder.step("upsample", (value,))


def _attention_2d_downsample(emitter: Emitter, module: Any, value: int) -> int:
    names = ("k", "v", "v_local", "proj")
    only_parts(module, "q", *names, "act", tensors=_TABLES)
    heads = _Heads(emitter, module)
    parts = _v2_parts(emitter, module, *names)
    query = module.q
    only_parts(query, "pool", "local", "proj")
    if type(query).__name__ != "LocalGlobalQuery" or is_overridden(query) or not is_plain(query.pool, nn.AvgPool2d):
        raise Unknown("q is no LocalGlobalQuery")
    every_other = (query.pool.kernel_size, query.pool.stride, query.pool.padding, query.pool.ceil_mode)
    if every_other != (1, 2, 0, False) or not is_depthwise(query.local, 2):
        raise Unknown("q.pool does not take every other pixel")
    # A pixel that is taken is one more tap in the middle.
    weight, bias = emitter.folded(query.local)
    middle = torch.zeros_like(weight)
    middle[..., weight.shape[2] // 2, weight.shape[3] // 2] = 1
    halved = emitter.builder.convolution(value, weight + middle, bias, stride=2, groups=len(weight))
    of_query, weight, bias = emitter.folded_part(query.proj)
    if not is_pointwise(of_query):
        raise Unknown("q.proj is no 1x1 convolution")
    q, k, v = (
        heads.project(of, pair)
        for of, pair in ((halved, (weight, bias)), (value, parts["k"][1:]), (value, parts["v"][1:]))
    )
    local = _local(emitter, heads, parts["v_local"], v, 2)
    queries, keys = module.attention_bias_idxs.shape
    value_dim = len(parts["v"][2]) // heads.heads
    out = heads.attend((q, k, v), value_dim, queries, keys, addend=local)
    out = emitter.part(module, "act", out)
    return heads.project_back(out, *parts["proj"][1:])


def _downsample_v2(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "conv", "norm", "attn")
    out = emitter.parts(module, value, "conv", "norm")
    if module._modules.get("attn") is None:
        return out
    return emitter.add(emitter.part(module, "attn", value), out)


def _v2_block(emitter: Emitter, module: Any, value: int) -> int:
    only_parts(module, "token_mixer", "ls1", "drop_path1", "mlp", "ls2", "drop_path2")
    for mixer, scale, drop in (("token_mixer", "ls1", "drop_path1"), ("mlp", "ls2", "drop_path2")):
        if module._modules.get(mixer) is None:
            continue
        out = emitter.scale(emitter.part(module, mixer, value), module._modules.get(scale))
        value = emitter.add(emitter.part(module, drop, out), value)
    return value


EMITTERS: dict[str, Emit] = {
    "Attention": _attention,
    "Attention2d": _attention_2d,
    "Attention2dDownsample": _attention_2d_downsample,
    "ConvMlpWithNorm": parts_in_order("fc1", "norm1", "act", "mid", "drop", "drop1", "fc2", "norm2", "drop2"),
    "Downsample": _downsample_v2,
    "EfficientFormerV2Block": _v2_block,
    "Flat": _flat,
    "MetaBlock1d": _meta_block_1d,
    "MetaBlock2d": _meta_block_2d,
    "Mlp": _mlp,
}
