"""The attention modules of EfficientFormer and EfficientFormerV2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn import functional

from effattn._tracing import becomes_node, is_exporting_to_onnx, static_shape
from effattn.functional import biased_attention
from effattn.nn.arguments import pair, require_image, require_positive
from effattn.nn.attention_bias import Size, attention_bias_index, gather_attention_bias, gather_attention_map
from effattn.nn.fold_cache import FoldCache, Folds, cached, invalidate
from effattn.nn.origin import is_genuine
from effattn.nn.projection import (
    at_once_under_autocast,
    cast_by_autocast,
    dtype_of_call,
    fold_batch_norm,
    folded_convolution,
    folded_pair,
    is_autocast,
    is_dense,
    is_depthwise,
    is_overridden,
    is_plain,
    is_pointwise,
    with_weight_in,
)
from effattn.nn.recorded import FxLeaf
from effattn.ops import projected_attention as _operator
from effattn.ops._operator import at_least_float32

# What makes the queries where the image is halved, by class: timm's, ours and the official one.
QUERIES = ("LocalGlobalQuery", "_LocalGlobalQuery", "LGQuery")
# What the operator calls an activation, by class; timm has a GELU of its own.
_ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": "gelu",
    "timm.layers.activations.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.linear.Identity": "none",
}
# Images of up to so many tokens are taken from input to output by one operator, which keeps them in cache.
_TOKENS_AT_ONCE = 400


class EfficientFormerAttention(FxLeaf, FoldCache):
    """Attention with a learned bias over distances, EfficientFormer (arXiv 2206.01191).

    Names of parts are those of timm's ``efficientformer.Attention`` and of the official ``Attention``, so that either's
    state dict loads. Arguments are timm's.

    Args:
        dim: channels of a token.
        key_dim: channels of a head's q and k.
        num_heads: heads.
        attn_ratio: channels of v over ``key_dim``.
        resolution: rows and columns of the tokens.
        dense_prediction: takes the state dict of Snap's backbones for detection and segmentation. Their bias is that of
            ``attention_biases_seg``, gathered for ``resolution`` and resized bicubically as a map of pairs of tokens
            where an image has another number of tokens; ``attention_biases`` is left over from classification.

    Raises:
        ValueError: for sizes that are not positive.
    """

    def __init__(
        self,
        dim: int = 384,
        key_dim: int = 32,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int | tuple[int, int] = 7,
        *,
        dense_prediction: bool = False,
    ) -> None:
        super().__init__()
        require_positive(dim=dim, key_dim=key_dim, num_heads=num_heads, resolution=min(pair(resolution)))
        self.num_heads, self.key_dim, self.attn_ratio = num_heads, key_dim, attn_ratio
        self.scale = key_dim**-0.5
        self.key_attn_dim = key_dim * num_heads
        self.val_dim = int(attn_ratio * key_dim)
        self.val_attn_dim = self.val_dim * num_heads
        self.qkv = nn.Linear(dim, 2 * self.key_attn_dim + self.val_attn_dim)
        self.proj = nn.Linear(self.val_attn_dim, dim)
        self.resolution = size = pair(resolution)
        if dense_prediction:
            _add_dense_prediction_biases(self, size)
        else:
            self.attention_biases = nn.Parameter(torch.zeros(num_heads, size[0] * size[1]))
            self.register_buffer("attention_bias_idxs", attention_bias_index(size))

    def forward(self, x: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """(B, H * W, C) -> (B, H * W, C), tokens row by row.

        Args:
            size: (H, W); by default those of the resolution, or, of another number of tokens, those of a square: tokens
                do not say what image they were. Dense prediction's bias does not depend on it.

        Raises:
            ValueError: for a number of tokens that is none of these.
        """
        if isinstance(x, Proxy):
            return self._fx_node(x, size)
        if x.dim() != 3:
            raise ValueError(f"x: expected shape (B, tokens, C), got {tuple(x.shape)}")
        _, tokens, _ = static_shape(x)
        folds = self._folds()
        is_plain_call = not torch.is_grad_enabled() and not is_autocast(x) and not becomes_node("biased_attention", x)
        if is_plain_call and tokens <= _TOKENS_AT_ONCE and _operator.serves(x):
            packed = cached(folds, f"packed {tokens} {size}", lambda: self._packed(tokens, size))
            if packed is not None:
                if x.shape[2] != packed.qkv.shape[1]:
                    raise ValueError(f"x: expected shape (B, tokens, {packed.qkv.shape[1]}), got {tuple(x.shape)}")
                # As an image of one row: of one column, neither memory order would be the tokens'.
                return _operator.projected_attention(x.mT.unsqueeze(2), packed, self.scale).squeeze(2).mT
        bias = cached(folds, ("bias", tokens, size), lambda: at_least_float32(self._bias(tokens, size)))
        heads = self.qkv(x).reshape(x.shape[0], tokens, self.num_heads, -1).transpose(1, 2)
        q, k, v = heads.split([self.key_dim, self.key_dim, static_shape(heads)[3] - 2 * self.key_dim], dim=3)
        out = biased_attention(q, k, v, bias, scale=self.scale)
        projected: torch.Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected

    def _packed(self, tokens: int, size: Size | None) -> _operator.Packed | None:
        """All weights of the one operator; None if the projections must be called."""
        qkv, proj = self.qkv, self.proj
        layers = (qkv, proj)
        if not all(is_plain(layer, nn.Linear) and is_dense(layer.weight) for layer in layers):
            return None
        if qkv.weight.dtype == torch.float64:
            return None
        value_dim = proj.in_features // self.num_heads
        by_head = [t.unflatten(0, (self.num_heads, -1)) for t in (qkv.weight, _bias_of(qkv))]
        weights, biases = (
            [part.flatten(0, 1) for part in t.split([self.key_dim, self.key_dim, value_dim], dim=1)] for t in by_head
        )
        q, k, v = zip(weights, biases, strict=True)
        return _operator.pack(q, k, v, self._bias(tokens, size), (proj.weight, _bias_of(proj)))

    def _bias(self, tokens: int, size: Size | None) -> torch.Tensor:
        if size is None and _is_dense_prediction(self):
            return _dense_prediction_bias(self, tokens, tokens)
        table, index = self.attention_biases, self.attention_bias_idxs
        assert isinstance(index, torch.Tensor)
        # Modules that accelerate() exchanged keep no resolution; it has looked at their index, which is of a square.
        known = static_shape(index)[0]
        own: Size = self.__dict__.get("resolution") or (math.isqrt(known),) * 2
        if size is None:
            size = own if tokens == known else _square(tokens)
        if size is None or tokens == 0 or size[0] * size[1] != tokens:
            expected = "a square number of" if size is None or tokens == 0 else f"{size[0]} x {size[1]}"
            raise ValueError(f"x: expected {expected} tokens, got shape (B, {tokens}, C)")
        if _is_dense_prediction(self):
            return _dense_prediction_bias(self, tokens, tokens)
        return gather_attention_bias(table, own, size, index=index)


def _add_dense_prediction_biases(module: Any, resolution: Size, stride: int = 1, *, persistent: bool = True) -> None:
    """What Snap's backbones for detection and segmentation have: a table of their own, beside that of classification.

    Theirs of classification is for 7 x 7 tokens; one of another size is taken as it comes.
    """
    heads = module.num_heads
    module.register_buffer("attention_biases", torch.zeros(heads, 49))
    module.register_buffer("attention_bias_idxs", torch.zeros(49, 49, dtype=torch.long), persistent=persistent)
    module.attention_biases_seg = nn.Parameter(torch.zeros(heads, resolution[0] * resolution[1]))
    index = attention_bias_index(resolution, stride)
    module.register_buffer("attention_bias_idxs_seg", index, persistent=persistent)
    module.register_load_state_dict_pre_hook(_take_classification_biases)


def _take_classification_biases(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in ("attention_biases", "attention_bias_idxs"):
        theirs, own = state_dict.get(prefix + name), module._buffers[name]
        if theirs is not None and own is not None and theirs.shape != own.shape:
            module._buffers[name] = own.new_zeros(theirs.shape)


def _is_dense_prediction(module: nn.Module) -> bool:
    """A replica of DataParallel has its parameters as attributes."""
    return hasattr(module, "attention_biases_seg")


def _dense_prediction_bias(module: Any, queries: int, keys: int) -> torch.Tensor:
    return gather_attention_map(module.attention_biases_seg, module.attention_bias_idxs_seg, queries, keys)


def _bias_of(layer: nn.Linear) -> torch.Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def _square(tokens: int) -> Size | None:
    side = 0 if torch.compiler.is_compiling() else math.isqrt(tokens)
    while side * side < tokens:  # of a number of a dynamic graph, which has no isqrt
        side += 1
    return (side, side) if side * side == tokens else None


class _ConvNorm(nn.Module):
    """Convolution and BatchNorm, under timm's names."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class _V2(FxLeaf, FoldCache):
    """What EfficientFormerV2's two attentions share: values that also go through a depthwise convolution of their own,
    parts with BatchNorm folded in where it can be, biases of any resolution.

    Parts are known by their order, since timm and the official repository name them differently.
    """

    num_heads: int
    key_dim: int
    scale: float
    resolution: int | Size
    attention_biases: torch.Tensor
    attention_bias_idxs: torch.Tensor
    attention_bias_idxs_seg: torch.Tensor
    proj: nn.Module
    queries_stride = 1

    def init_non_persistent_buffers(self) -> None:
        """After to_empty(), as timm has it: the index is in no state dict."""
        index = attention_bias_index(pair(self.resolution), self.queries_stride, self.attention_bias_idxs.device)
        if _is_dense_prediction(self):
            self.attention_bias_idxs_seg = index
        else:
            self.attention_bias_idxs = index
        invalidate(self)

    def _projected(self, folds: Folds | None, x: torch.Tensor, *names: str) -> list[torch.Tensor]:
        """1x1 convolutions of x by the names of their parts: one product, if all can be."""
        parts = [self._modules[name] for name in names]
        dtype = dtype_of_call(x)
        folded = cached(folds, (*names, dtype), lambda: _folded_together(parts, dtype))
        if folded is None:
            return [part(x) for part in parts if part is not None]
        sizes, weight, bias = folded
        return list(folded_convolution(x, weight, bias).split(sizes, dim=1))

    def _convolved(self, folds: Folds | None, name: str, x: torch.Tensor) -> torch.Tensor:
        part: Any = self._modules[name]
        dtype = dtype_of_call(x)
        folded = cached(folds, (name, dtype), lambda: _folded_convolution(part, dtype))
        if folded is None:
            out: torch.Tensor = part(x)
            return out
        conv, weight, bias = folded
        return folded_convolution(x, weight, bias, conv)

    def _folded_parts(self, *names: str) -> list[_operator.Pair] | None:
        """Weights and biases of convolutions, matrices where they are 1x1; None if a part must be called."""
        pairs = [folded_pair(self._modules[name], self._in_front(name)) for name in names]
        if not all(pair is not None and self._fits(name, pair[0]) for name, pair in zip(names, pairs, strict=True)):
            return None
        folded = [fold_batch_norm(*pair, rounded=False) for pair in pairs if pair is not None]
        return [(weight.flatten(1) if weight.shape[2:].numel() == 1 else weight, bias) for weight, bias in folded]

    def _fits(self, name: str, conv: nn.Conv2d) -> bool:
        """Whether a convolution has the form that the operator knows."""
        if name == "stride_conv":
            return is_depthwise(conv, 2)
        return is_depthwise(conv, self.queries_stride) if name == "v_local" else is_pointwise(conv)

    def _in_front(self, name: str) -> int:
        """Modules in front of a part's convolution: the official repository has the activation in ``proj``."""
        return 1 if name == "proj" and "act" not in self._modules else 0

    def _activation(self) -> str | None:
        """What stands in front of the last convolution, if the operator knows it."""
        act = self._modules["act"] if "act" in self._modules else next(iter(self.proj._modules.values()), None)
        if act is None:
            return None
        if is_overridden(act) or getattr(act, "approximate", "none") != "none":
            return None
        return _ACTIVATIONS.get(f"{type(act).__module__}.{type(act).__qualname__}")

    def _packed_if_served(self, folds: Folds | None, x: torch.Tensor, tokens: int, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, kept, for so many keys; None where no kernel serves, or gradients are asked for."""
        if torch.is_grad_enabled() or tokens > _TOKENS_AT_ONCE or not _operator.serves(x):
            return None
        if self.attention_biases.dtype == torch.float64 or not at_once_under_autocast(x):
            return None
        return cached(folds, f"packed {x.shape[2]}x{x.shape[3]}", make)

    def _activated_and_projected(self, folds: Folds | None, x: torch.Tensor) -> torch.Tensor:
        proj = self.proj
        act = self._modules.get("act")
        dtype = dtype_of_call(x)
        folded = cached(folds, ("proj", dtype), lambda: _folded_together([proj], dtype, self._in_front("proj")))
        if folded is None:
            out: torch.Tensor = proj(x if act is None else act(x))
            return out
        if act is None and self._in_front("proj"):
            act, *_ = proj._modules.values()
        return folded_convolution(x if act is None else act(x), *folded[1:])

    def _heads(self, image: torch.Tensor, batch: int) -> torch.Tensor:
        """(B, heads * channels, H, W) -> (B, heads, H * W, channels)"""
        _, channels, height, width = static_shape(image)
        sizes = (batch, self.num_heads, channels // self.num_heads, height * width)
        return image.reshape(sizes).transpose(-2, -1)

    def _added(self, out: torch.Tensor, local: torch.Tensor, batch: int) -> torch.Tensor:
        """(B, heads, H * W, channels) as an image like that of the local path, and both together."""
        return out.transpose(-2, -1).reshape(batch, *static_shape(local)[1:]) + local

    def _bias(self, size: Size, folds: Folds | None = None) -> torch.Tensor:
        bias: torch.Tensor = cached(folds, ("bias", *size), lambda: at_least_float32(self._gathered(size)))
        return bias

    def _gathered(self, size: Size) -> torch.Tensor:
        if _is_dense_prediction(self):
            rows, columns = (-(-size[0] // self.queries_stride), -(-size[1] // self.queries_stride))
            return _dense_prediction_bias(self, rows * columns, size[0] * size[1])
        own = pair(self.resolution)
        return gather_attention_bias(self.attention_biases, own, size, self.queries_stride, self.attention_bias_idxs)


def _folded_convolution(part: nn.Module, dtype: torch.dtype) -> tuple[nn.Conv2d, torch.Tensor, torch.Tensor] | None:
    """A convolution with its weight and bias after folding, for a call of ``dtype``; None where the part must be
    called.

    So it is in float16 too, or folded weights would be rounded once more than their parts are.
    """
    pair = folded_pair(part)
    if pair is None or pair[0].weight.dtype.itemsize < 4:
        return None
    return pair[0], *with_weight_in(dtype, fold_batch_norm(*pair))


def _folded_together(
    parts: list[Any], dtype: torch.dtype, in_front: int = 0
) -> tuple[list[int], torch.Tensor, torch.Tensor] | None:
    """Outputs, weights and biases of 1x1 convolutions of one input; None where a part must be called, as above."""
    pairs = [pair for pair in (folded_pair(part, in_front) for part in parts) if pair is not None]
    if len(pairs) != len(parts) or not all(is_pointwise(conv) and conv.weight.dtype.itemsize >= 4 for conv, _ in pairs):
        return None
    weights, biases = zip(*(fold_batch_norm(*pair) for pair in pairs), strict=True)
    return [static_shape(bias)[0] for bias in biases], *with_weight_in(dtype, (torch.cat(weights), torch.cat(biases)))


class EfficientFormerV2Attention(_V2):
    """Attention with talking heads and a local path of the values, EfficientFormerV2 (arXiv 2212.08059).

    Names of parts are those of timm's ``efficientformer_v2.Attention2d``; state dicts of timm and of the official
    ``Attention4D`` load. Arguments are timm's.

    Args:
        dim: channels.
        key_dim: channels of a head's q and k.
        num_heads: heads.
        attn_ratio: channels of v over ``key_dim``.
        resolution: rows and columns of the image; others are taken too, with the bias resized bicubically.
        act_layer: before the projection.
        stride: attends at a resolution so many times smaller, then upsamples bilinearly; None for the image's own.
        dense_prediction: as of :class:`EfficientFormerAttention`.

    Raises:
        ValueError: for sizes that are not positive.
    """

    def __init__(
        self,
        dim: int = 384,
        key_dim: int = 32,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int | tuple[int, int] = 7,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        stride: int | None = None,
        *,
        dense_prediction: bool = False,
    ) -> None:
        super().__init__()
        height, width = pair(resolution)
        require_positive(dim=dim, key_dim=key_dim, num_heads=num_heads, resolution=min(height, width))
        require_positive(stride=1 if stride is None else stride)
        self.num_heads, self.key_dim, self.attn_ratio, self.scale = num_heads, key_dim, attn_ratio, key_dim**-0.5
        self.stride_conv: nn.Module | None = None
        self.upsample: nn.Module | None = None
        if stride is not None:
            height, width = -(-height // stride), -(-width // stride)
            self.stride_conv = _ConvNorm(dim, dim, 3, stride, groups=dim)
            self.upsample = nn.Upsample(scale_factor=stride, mode="bilinear")
        self.resolution = (height, width)
        self.N = height * width
        self.d = int(attn_ratio * key_dim)
        self.dh = self.d * num_heads
        self.q = _ConvNorm(dim, key_dim * num_heads)
        self.k = _ConvNorm(dim, key_dim * num_heads)
        self.v = _ConvNorm(dim, self.dh)
        self.v_local = _ConvNorm(self.dh, self.dh, 3, groups=self.dh)
        self.talking_head1 = nn.Conv2d(num_heads, num_heads, 1)
        self.talking_head2 = nn.Conv2d(num_heads, num_heads, 1)
        self.act = act_layer()
        self.proj = _ConvNorm(self.dh, dim)
        if dense_prediction:
            _add_dense_prediction_biases(self, self.resolution, persistent=False)
        else:
            self.attention_biases = nn.Parameter(torch.zeros(num_heads, self.N))
            self.register_buffer("attention_bias_idxs", attention_bias_index(self.resolution), persistent=False)
        self.register_load_state_dict_pre_hook(_rename)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, H, W) -> (B, dim, H, W)"""
        if isinstance(x, Proxy):
            return self._fx_node(x)
        require_image(x)
        _, _, height, width = static_shape(x)
        size, folds = (height, width), self._folds()
        attended = size if self.stride_conv is None else _operator.halved(size)
        packed = self._packed_if_served(folds, x, attended[0] * attended[1], lambda: self._packed(attended))
        if packed is not None:
            weights, activation = packed
            require_image(x, weights.qkv.shape[1])
            x = cast_by_autocast(x)
            return _operator.projected_attention(x, weights, self.scale, activation=activation, out_size=size)
        if self.stride_conv is not None:
            x = self._convolved(folds, "stride_conv", x)
            _, _, height, width = static_shape(x)
        q, k, v = self._projected(folds, x, "q", "k", "v")
        local = self._convolved(folds, "v_local", v)
        batch = x.shape[0]
        q, k, v = (self._heads(t, batch) for t in (q, k, v))
        out = self._added(self._attend(q, k, v, self._bias((height, width), folds), folds), local, batch)
        if self.upsample is not None:
            upsampled: torch.Tensor = self.upsample(out)
            # At a size that the stride does not divide it would come out larger than it went in.
            if static_shape(upsampled)[2:] != size:
                upsampled = functional.interpolate(out, size=size, mode="bilinear")
            out = upsampled
        return self._activated_and_projected(folds, out)

    def _packed(self, size: Size) -> tuple[_operator.Packed, str] | None:
        """All weights of the one operator, and its activation; None if a part must be called."""
        names = ("q", "k", "v", "v_local", "proj", *(() if self.stride_conv is None else ("stride_conv",)))
        folded = self._folded_parts(*names)
        mixing, activation = self._mixing(), self._activation()
        if folded is None or mixing is None or activation is None or not self._upsamples_back():
            return None
        q, k, v, local, proj, *stride_conv = folded
        halving = stride_conv[0] if stride_conv else None
        bias = self._bias(size)
        return _operator.pack(q, k, v, bias, proj, talking_heads=mixing, local=local, halving=halving), activation

    def _upsamples_back(self) -> bool:
        """Whether the operator can upsample to the image that came in; by then the stride is known to be two."""
        up, halved = self.upsample, self.stride_conv is not None
        if up is None or not halved:
            return up is None and not halved
        plain = isinstance(up, nn.Upsample) and is_plain(up, nn.Upsample)
        return plain and up.mode == "bilinear" and not up.align_corners and up.scale_factor in (2.0, (2.0, 2.0))

    def _mixing(self) -> list[torch.Tensor] | None:
        """The convolutions over the heads as matrices and biases; None if one of them must be called."""
        convolutions = (self.talking_head1, self.talking_head2)
        if not all(is_plain(conv, nn.Conv2d) and is_pointwise(conv) for conv in convolutions):
            return None
        none = self.attention_biases.new_zeros(self.num_heads)
        return [t for conv in convolutions for t in (conv.weight.flatten(1), none if conv.bias is None else conv.bias)]

    def _kept_mixing(self) -> list[torch.Tensor] | None:
        """As the operator takes it, and no views of parameters, which torch could not swap."""
        mixing = self._mixing()
        return None if mixing is None else [at_least_float32(t.detach()) for t in mixing]

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, folds: Folds | None
    ) -> torch.Tensor:
        mixing = self._mixing() if folds is None else cached(folds, "mixing", self._kept_mixing)
        if mixing is None or (is_exporting_to_onnx() and not becomes_node("biased_attention", q, k, v)):
            logits = self.scale * (q @ k.transpose(-2, -1)) + bias
            return self.talking_head2(self.talking_head1(logits).softmax(dim=-1)) @ v
        return biased_attention(q, k, v, bias, scale=self.scale, talking_heads=mixing)


class EfficientFormerV2AttentionDownsample(_V2):
    """The attention that halves the resolution, EfficientFormerV2 (arXiv 2212.08059): every other row and column asks.

    Names of parts are those of timm's ``efficientformer_v2.Attention2dDownsample``. Arguments are timm's, as of
    :class:`EfficientFormerV2Attention`; ``out_dim``: channels of the output, by default ``dim``.

    Raises:
        ValueError: for sizes that are not positive.
    """

    queries_stride = 2

    def __init__(
        self,
        dim: int = 384,
        key_dim: int = 16,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int | tuple[int, int] = 7,
        out_dim: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        *,
        dense_prediction: bool = False,
    ) -> None:
        super().__init__()
        height, width = pair(resolution)
        out_dim = dim if out_dim is None else out_dim
        require_positive(dim=dim, key_dim=key_dim, num_heads=num_heads, resolution=min(height, width), out_dim=out_dim)
        self.num_heads, self.key_dim, self.attn_ratio, self.scale = num_heads, key_dim, attn_ratio, key_dim**-0.5
        self.resolution, self.out_dim = (height, width), out_dim
        self.d = int(attn_ratio * key_dim)
        self.dh = self.d * num_heads
        self.q = _LocalGlobalQuery(dim, key_dim * num_heads)
        self.k = _ConvNorm(dim, key_dim * num_heads)
        self.v = _ConvNorm(dim, self.dh)
        self.v_local = _ConvNorm(self.dh, self.dh, 3, 2, groups=self.dh)
        self.act = act_layer()
        self.proj = _ConvNorm(self.dh, out_dim)
        if dense_prediction:
            _add_dense_prediction_biases(self, self.resolution, 2, persistent=False)
        else:
            self.attention_biases = nn.Parameter(torch.zeros(num_heads, height * width))
            self.register_buffer("attention_bias_idxs", attention_bias_index(self.resolution, 2), persistent=False)
        self.register_load_state_dict_pre_hook(_rename)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))"""
        if isinstance(x, Proxy):
            return self._fx_node(x)
        require_image(x)
        _, _, height, width = static_shape(x)
        size, folds = (height, width), self._folds()
        packed = self._packed_if_served(folds, x, size[0] * size[1], lambda: self._packed(size))
        if packed is not None:
            weights, activation = packed
            require_image(x, weights.qkv.shape[1])
            return _operator.projected_attention(cast_by_autocast(x), weights, self.scale, activation=activation)
        k, v = self._projected(folds, x, "k", "v")
        local = self._convolved(folds, "v_local", v)
        batch = x.shape[0]
        q, k, v = (self._heads(t, batch) for t in (self.q(x), k, v))
        out = biased_attention(q, k, v, self._bias(size, folds), scale=self.scale)
        return self._activated_and_projected(folds, self._added(out, local, batch))

    def _packed(self, size: Size) -> tuple[_operator.Packed, str] | None:
        """All weights of the one operator, and its activation; None if a part must be called."""
        folded, activation = self._folded_parts("k", "v", "v_local", "proj"), self._activation()
        query = self._modules["q"]
        if folded is None or activation is None or is_overridden(query):
            return None
        if type(query).__name__ not in QUERIES or not is_genuine(type(query)):
            return None
        pool, local, q = query.pool, query.local, folded_pair(query.proj)
        if type(local) is nn.Sequential and len(local) == 1 and not is_overridden(local):  # the official one's
            (local,) = local._modules.values()
        if not is_plain(local, nn.Conv2d) or not is_dense(local.weight) or not is_depthwise(local, 2):
            return None
        if not is_plain(pool, nn.AvgPool2d) or not takes_every_other(pool) or q is None or not is_pointwise(q[0]):
            return None
        k, v, v_local, proj = folded
        weight, bias = fold_batch_norm(*q, rounded=False)
        # Pooling takes every other pixel as it is: one more at the centre of the convolution.
        taps = local.weight.float()
        centre = torch.zeros_like(taps)
        centre[:, :, taps.shape[2] // 2, taps.shape[3] // 2] = 1
        halving = (taps + centre, bias.new_zeros(len(taps)) if local.bias is None else local.bias)
        packed = _operator.pack(
            (weight.flatten(1), bias),
            k,
            v,
            self._bias(size),
            proj,
            local=v_local,
            halving=halving,
            halves_queries_alone=True,
        )
        return packed, activation


def takes_every_other(pool: Any) -> bool:
    """Whether a pooling takes every other row and column as they are."""
    sizes = ((pool.kernel_size, 1), (pool.stride, 2), (pool.padding, 0))
    return all(size in (expected, (expected, expected)) for size, expected in sizes)


class _LocalGlobalQuery(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(1, 2, 0)
        self.local = nn.Conv2d(in_dim, in_dim, 3, 2, 1, groups=in_dim)
        self.proj = _ConvNorm(in_dim, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.local(x) + self.pool(x))


def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The official repository counts a part's modules, has the activation in ``proj``, and stores indices."""
    for index in ("attention_bias_idxs", "attention_bias_idxs_seg"):
        state_dict.pop(prefix + index, None)
    parts = [f"{prefix}{name}" for name in ("q", "k", "v", "v_local", "stride_conv", "proj", "q.proj")]
    for part in parts:
        first = 1 if f"{part}.2.weight" in state_dict else 0  # behind the activation
        for offset, name in enumerate(("conv", "bn")):
            old = f"{part}.{first + offset}."
            for key in [key for key in state_dict if key.startswith(old)]:
                state_dict[f"{part}.{name}.{key.removeprefix(old)}"] = state_dict.pop(key)
    local = f"{prefix}q.local."
    for key in [key for key in state_dict if key.startswith(f"{local}0.")]:
        state_dict[local + key.removeprefix(f"{local}0.")] = state_dict.pop(key)
