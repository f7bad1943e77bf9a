"""The attention modules of EfficientViT (Microsoft)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy

from effattn._tracing import becomes_node, static_shape
from effattn.functional import biased_attention, cascaded_group_attention
from effattn.nn.arguments import require_image, require_positive
from effattn.nn.attention_bias import attention_bias_index, gather_attention_bias, resize_attention_biases
from effattn.nn.batch_norm import training_pair, update_running_statistics
from effattn.nn.fold_cache import FoldCache, cached, invalidate
from effattn.nn.projection import (
    calls_in_order,
    cast_by_autocast,
    fold_batch_norm,
    folded_convolution,
    folded_pair,
    is_depthwise,
    is_overridden,
    is_plain,
    is_pointwise,
)
from effattn.nn.recorded import FxLeaf
from effattn.ops import OPERATORS
from effattn.ops import cascaded_group_attention_projected as _projected
from effattn.ops._plain import partition, reverse_partition


class CascadedGroupAttention(FxLeaf, FoldCache):
    """Cascaded group attention with its projection, EfficientViT (arXiv 2305.07027), section 3.2.

    Names of parts are those of timm's ``efficientvit_msra.CascadedGroupAttention``; state dicts of timm and of the
    official repository load. Arguments are timm's. In evaluation, BatchNorm is folded into the convolutions and the
    whole cascade is one operator: with the projection where no gradients are asked for. In training in float32 it is
    one with BatchNorm inside; in other dtypes, and where a part has hooks, only the attention is one.

    Args:
        dim: channels, a multiple of ``num_heads``.
        key_dim: channels of q and k.
        num_heads: heads of the cascade.
        attn_ratio: channels of v over ``key_dim``; ``dim == num_heads * attn_ratio * key_dim``.
        resolution: rows and columns of the image, or of a window; images of other sizes are taken too, with the bias
            resized bicubically.
        kernels: size of the depthwise convolution of q, a head each, odd.

    Raises:
        ValueError: for sizes that do not fit, even kernels, or fewer kernels than heads.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int = 14,
        kernels: Sequence[int] = (5, 5, 5, 5),
    ) -> None:
        super().__init__()
        require_positive(dim=dim, key_dim=key_dim, num_heads=num_heads, resolution=resolution)
        self.num_heads, self.key_dim, self.attn_ratio = num_heads, key_dim, attn_ratio
        self.val_dim = int(attn_ratio * key_dim)
        self.scale = key_dim**-0.5
        if dim != num_heads * self.val_dim:
            raise ValueError(f"dim: expected num_heads * attn_ratio * key_dim = {num_heads * self.val_dim}, got {dim}")
        if len(kernels) < num_heads:
            raise ValueError(f"kernels: expected a size for each of {num_heads} heads, got {tuple(kernels)}")
        if any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels: expected odd sizes, got {tuple(kernels)}")
        self.qkvs = nn.ModuleList(_ConvNorm(self.val_dim, 2 * key_dim + self.val_dim) for _ in range(num_heads))
        self.dws = nn.ModuleList(_ConvNorm(key_dim, key_dim, kernel, key_dim) for kernel in kernels[:num_heads])
        self.proj = nn.Sequential(nn.ReLU(), _ConvNorm(dim, dim))
        nn.init.zeros_(self.proj[1].bn.weight)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution * resolution))
        index = attention_bias_index((resolution, resolution))
        self.register_buffer("attention_bias_idxs", index, persistent=False)
        self.register_load_state_dict_pre_hook(_rename)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, H, W) -> (B, dim, H, W), of x's memory format; the image is one window."""
        if isinstance(x, Proxy):
            return self._fx_node(x)
        return self.attend(x, None)

    def attend(self, x: torch.Tensor, window: tuple[int, int] | None) -> torch.Tensor:
        """In windows of (height, width), with zeros below and right of the image; None for one as large as it."""
        require_image(x)
        _, _, height, width = static_shape(x)
        # No window is without tokens, even of an empty image.
        size, folds = (height or 1, width or 1) if window is None else window, self._folds()
        x = cast_by_autocast(x)
        # As a node of an ONNX graph, the operator has no projection: engines are faster at convolutions.
        takes_all = not torch.is_grad_enabled() and not becomes_node("cascaded_group_attention", x)
        if takes_all and self.attention_biases.dtype != torch.float64 and _projected.serves(x):
            packed = cached(folds, f"packed {size[0]}x{size[1]}", lambda: self._packed(size))
            if packed is None:
                return self._unfolded(x, size)
            require_image(x, packed.proj.shape[1])
            return _projected.projected(x, packed, self.scale, *size)
        weights = cached(folds, (*size, x.dtype), lambda: self._weights_for(size, x.dtype))
        if weights is None:
            return self._unfolded(x, size)
        require_image(x, weights.proj_weight.shape[1])
        out = cascaded_group_attention(x, *weights[:5], scale=self.scale, window_size=size)
        return folded_convolution(out.relu(), weights.proj_weight, weights.proj_bias)

    def _weights_for(self, size: tuple[int, int], dtype: torch.dtype) -> _projected.Weights | None:
        """Of the operator and of the projection behind it, for images of a dtype."""
        weights = self._all_weights(size)
        if weights is None:
            return None
        return weights._replace(proj_weight=weights.proj_weight.to(dtype))

    def _packed(self, size: tuple[int, int]) -> _projected.Packed | None:
        weights = self._all_weights(size)
        return None if weights is None else _projected.pack(weights)

    def _all_weights(self, size: tuple[int, int]) -> _projected.Weights | None:
        """With BatchNorm folded in; None if that cannot be, or a part has hooks."""
        parts = [*self.qkvs._modules.values(), *self.dws._modules.values()]
        pairs = [folded_pair(part) for part in parts]
        if not self._fits([pair[0] for pair in pairs if pair is not None]):
            return None
        if not calls_in_order(self.proj) or len(self.proj._modules) != 2:
            return None
        relu, last = self.proj._modules.values()
        proj = folded_pair(last)
        if proj is None or not is_pointwise(proj[0]) or not is_plain(relu, nn.ReLU):
            return None
        heads = self.num_heads
        folded = (fold_batch_norm(*pair, rounded=False) for pair in pairs if pair is not None)
        weights, biases = zip(*folded, strict=True)
        proj_weight, proj_bias = fold_batch_norm(*proj, rounded=False)
        return _projected.Weights(
            weights[:heads],
            biases[:heads],
            weights[heads:],
            biases[heads:],
            self._bias(size).to(proj_weight.dtype),
            proj_weight.flatten(1),
            proj_bias,
        )

    def _fits(self, convolutions: Sequence[nn.Conv2d]) -> bool:
        """Whether these are the convolutions of all heads, in the form that the operators know."""
        heads = self.num_heads
        qkvs, dws = convolutions[:heads], convolutions[heads:]
        return len(dws) == heads and all(map(is_pointwise, qkvs)) and all(map(is_depthwise, dws))

    @property
    def resolution(self) -> int:
        """Rows and columns that the biases were made for."""
        return math.isqrt(static_shape(self.attention_biases)[1])

    def init_non_persistent_buffers(self) -> None:
        """After to_empty(), as timm has it: the index is in no state dict."""
        size = (self.resolution, self.resolution)
        self.attention_bias_idxs = attention_bias_index(size, device=self.attention_biases.device)
        invalidate(self)

    def set_resolution(self, resolution: int) -> None:
        """Resizes the table of biases for good, as timm does; images of any size are taken without."""
        require_positive(resolution=resolution)
        if resolution == self.resolution:
            return
        invalidate(self)
        side, size = self.resolution, (resolution, resolution)
        table = resize_attention_biases(self.attention_biases.detach(), (side, side), size, antialias=True)
        self.attention_biases = nn.Parameter(table.contiguous(), self.attention_biases.requires_grad)
        self.init_non_persistent_buffers()
        if "resolution" in self.__dict__:  # of the class that accelerate() exchanged
            self.__dict__["resolution"] = resolution

    def _bias(self, size: tuple[int, int]) -> torch.Tensor:
        own = (self.resolution, self.resolution)
        return gather_attention_bias(self.attention_biases, own, size, index=self.attention_bias_idxs)

    def _unfolded(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """With BatchNorm of this batch, in the operator or beside it."""
        if not _projected.serves(x):
            return self._layer_by_layer(x, size)
        _, _, height, width = static_shape(x)
        windows = x if height % size[0] == 0 and width % size[1] == 0 else partition(x, size)
        out = self._cascade_with_batch_norm(windows, size)
        if out is None:
            return self._layer_by_layer(x, size)
        if any(getattr(part, "inplace", False) for part in self.proj.modules()):
            out = out.clone()  # the backward reads it
        projected: torch.Tensor = self.proj(out)
        return projected if windows is x else reverse_partition(projected, x, size)

    def _cascade_with_batch_norm(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor | None:
        """Whole windows through all heads; None where the operator cannot stand for the modules."""
        parts = [*self.qkvs._modules.values(), *self.dws._modules.values()]
        pairs = [pair for pair in map(training_pair, parts) if pair is not None]
        if len(pairs) != len(parts):
            return None
        count = x.numel() // max(x.shape[1], 1)  # of numbers of a channel; torch refuses to normalise one
        if count < 2 or not self._fits([conv for conv, _ in pairs]):
            return None
        if x.dtype != torch.float32 or self.attention_biases.dtype != torch.float32:
            return None
        convs, norms = zip(*pairs, strict=True)
        heads, weights = self.num_heads, [conv.weight for conv in convs]
        require_image(x, heads * weights[0].shape[1])
        out, statistics = OPERATORS["cascaded_group_attention_batch_norm"](
            x,
            weights[:heads],
            weights[heads:],
            [norm.weight for norm in norms[:heads]],
            [norm.bias for norm in norms[:heads]],
            [norm.weight for norm in norms[heads:]],
            [norm.bias for norm in norms[heads:]],
            self._bias(size),
            [norm.eps for norm in norms],
            self.scale,
            *size,
        )
        for i, (norm, (means, variances)) in enumerate(zip(norms, (*statistics, *statistics), strict=True)):
            outputs = weights[0].shape[0]
            of_norm = slice(0, outputs) if i < heads else slice(outputs, None)
            update_running_statistics(norm, means[of_norm], variances[of_norm], count)
        return out

    def _layer_by_layer(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """As the authors have it, each part called."""
        windows = partition(x, size)
        # In one piece, so that the gradients of all heads' biases are joined by one operation.
        biases, tokens = self._bias(size).split(1), size[0] * size[1]
        outs: list[torch.Tensor] = []
        heads = zip(windows.chunk(self.num_heads, 1), self.qkvs, self.dws, biases, strict=True)
        for i, (group, qkv, dw, bias) in enumerate(heads):
            feat = qkv(group if i == 0 else group + outs[-1])
            sizes = [self.key_dim, self.key_dim, static_shape(group)[1]]
            q, k, v = feat.split(sizes, dim=1)
            q, k, v = (
                t.reshape(-1, 1, channels, tokens).transpose(-2, -1)
                for t, channels in zip((dw(q), k, v), sizes, strict=True)
            )
            out = biased_attention(q, k, v, bias, scale=self.scale)
            outs.append(out.transpose(-2, -1).reshape(-1, sizes[2], *size))
        projected: torch.Tensor = self.proj(torch.cat(outs, dim=1))
        return reverse_partition(projected, x, size)


class LocalWindowAttention(FxLeaf):
    """:class:`CascadedGroupAttention` in windows, as timm's ``efficientvit_msra.LocalWindowAttention``.

    Args:
        dim, key_dim, num_heads, attn_ratio, kernels: as there.
        resolution: rows and columns of the image; others are taken too.
        window_resolution: rows and columns of a window, or of the image if that is smaller.

    Raises:
        ValueError: as :class:`CascadedGroupAttention`, and for a window without tokens.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int = 14,
        window_resolution: int = 7,
        kernels: Sequence[int] = (5, 5, 5, 5),
    ) -> None:
        super().__init__()
        if window_resolution < 1:
            raise ValueError(f"window_resolution: expected a positive number, got {window_resolution}")
        self.dim, self.num_heads = dim, num_heads
        self.resolution, self.window_resolution = resolution, window_resolution
        self.attn = CascadedGroupAttention(
            dim, key_dim, num_heads, attn_ratio, min(window_resolution, resolution), kernels
        )

    def set_input_size(self, resolution: int) -> None:
        """As timm's: the image's rows and columns, where they are smaller than a window."""
        require_positive(resolution=resolution)
        self.resolution = resolution
        self.attn.set_resolution(min(self.window_resolution, resolution))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, H, W) -> (B, dim, H, W), of x's memory format."""
        if isinstance(x, Proxy):
            return self._fx_node(x)
        attn = self.attn
        side = math.isqrt(static_shape(attn.attention_biases)[1])
        if isinstance(attn, CascadedGroupAttention) and not is_overridden(attn):
            return attn.attend(x, (side, side))
        out: torch.Tensor = attn(partition(x, (side, side)))
        return reverse_partition(out, x, (side, side))


class _ConvNorm(nn.Sequential):
    """Convolution and BatchNorm, under timm's names."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)


def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The official repository says ``c`` for ``conv``, and stores the indices that a bias is gathered by."""
    state_dict.pop(f"{prefix}attention_bias_idxs", None)
    for name in [name for name in state_dict if name.startswith(prefix) and ".c." in name.removeprefix(prefix)]:
        state_dict[prefix + name.removeprefix(prefix).replace(".c.", ".conv.")] = state_dict.pop(name)
