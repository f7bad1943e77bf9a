"""Modules over the functions: state dicts of timm and of the official repositories load unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from effattn.functional import multi_scale_linear_attention

__all__ = ["LiteMLA"]


class LiteMLA(nn.Module):
    """Lightweight multi-scale linear attention, EfficientViT (arXiv 2205.14756), figure 2.

    A 1x1 convolution to q, k and v, :func:`effattn.multi_scale_linear_attention`, a 1x1 convolution back. Names of
    parts are those of timm's ``efficientvit_mit.LiteMLA`` and of the official ``LiteMLA``, so that either's
    state dict loads. Arguments are timm's.

    In evaluation without gradients, 1x1 convolutions are matrix products with the BatchNorm behind them folded
    in. The folded weights are kept for the next call, and made anew after anything that changes the weights in
    a way torch counts (loading, an optimiser's step, conversions) and after a change of mode; only writing to
    ``.data`` in evaluation mode goes unseen.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        heads: heads of one scale; by default ``in_channels // dim * heads_ratio``.
        heads_ratio: see ``heads``.
        dim: channels of a head.
        use_bias: of the first convolution and the aggregation, and of the last convolution; one for both or a pair.
        norm_layer: behind the first and the last convolution, or None; one for both or a pair.
        act_layer: behind the norm, or None; one for both or a pair.
        scales: kernel sizes of the aggregation, odd.
        eps: added to the denominator; 1e-15 in the official code, 1e-5 in timm.

    Raises:
        ValueError: for an even scale, or sizes that are not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int | None = None,
        heads_ratio: float = 1.0,
        dim: int = 8,
        use_bias: bool | tuple[bool, bool] = False,
        norm_layer: type[nn.Module] | tuple[type[nn.Module] | None, type[nn.Module] | None] | None = (
            None,
            nn.BatchNorm2d,
        ),
        act_layer: type[nn.Module] | tuple[type[nn.Module] | None, type[nn.Module] | None] | None = (None, None),
        scales: Sequence[int] = (5,),
        eps: float = 1e-15,
    ) -> None:
        super().__init__()
        heads = heads or int(in_channels // dim * heads_ratio)
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("dim", dim),
            ("heads", heads),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for scale in scales:
            if scale < 1 or scale % 2 == 0:
                raise ValueError(f"scales: expected odd kernel sizes, got {tuple(scales)}")
        biases, norms, acts = _both(use_bias), _both(norm_layer), _both(act_layer)
        total = heads * dim
        self.dim, self.eps = dim, eps
        self.qkv = _ConvNormAct(in_channels, 3 * total, biases[0], norms[0], acts[0])
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * total, 3 * total, scale, padding=scale // 2, groups=3 * total, bias=biases[0]),
                nn.Conv2d(3 * total, 3 * total, 1, groups=3 * heads, bias=biases[0]),
            )
            for scale in scales
        )
        self.proj = _ConvNormAct(total * (1 + len(scales)), out_channels, biases[1], norms[1], acts[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W), of x's memory format."""
        depthwise, pointwise = ([pair[i] for pair in self.aggreg] for i in (0, 1))
        out = multi_scale_linear_attention(
            self._project("qkv", x),
            [conv.weight for conv in depthwise],
            [conv.weight for conv in pointwise],
            _biases(depthwise),
            _biases(pointwise),
            head_dim=self.dim,
            eps=self.eps,
        )
        return self._project("proj", out)

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A part made of a 1x1 convolution, a norm and an activation, as a matrix product where that can be."""
        part = self._modules[name]
        assert part is not None
        parts = part._modules  # looked up directly: at 14x14 tokens the searches of nn.Module show
        if not _is_projection(parts):
            projected: torch.Tensor = part(x)
            return projected
        conv, norm, act = parts["conv"], parts.get("norm"), parts.get("act")
        assert isinstance(conv, nn.Conv2d)
        if type(norm) is nn.BatchNorm2d and _is_fixed(norm) and not torch.is_grad_enabled():
            out = pointwise_convolution(x, *self._folded(name, conv, norm))
        else:
            out = pointwise_convolution(x, conv.weight, conv.bias)
            out = out if norm is None else norm(out)
        return out if act is None else act(out)

    def _folded(self, name: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():
            return fold_batch_norm(conv, norm)
        # Buffers include the number of batches: it counts, which batch_norm does not, when the statistics move.
        sources = [conv.weight, conv.bias, *norm._parameters.values(), *norm._buffers.values()]
        try:
            state = (norm.eps, *((None if t is None else (t.data_ptr(), t._version, t.dtype)) for t in sources))
        except RuntimeError:  # inference tensors count no versions
            return fold_batch_norm(conv, norm)
        kept: dict[str, Any] = self.__dict__.setdefault("_effattn_folded", {})
        if name not in kept or kept[name][0] != state:
            kept[name] = (state, fold_batch_norm(conv, norm))
        folded: tuple[torch.Tensor, torch.Tensor] = kept[name][1]
        return folded

    def train(self, mode: bool = True) -> LiteMLA:
        self.__dict__.pop("_effattn_folded", None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_effattn_folded"}


class _ConvNormAct(nn.Module):
    """1x1 convolution, norm, activation, under the names that timm and the official repository give them."""

    def __init__(
        self, in_channels: int, out_channels: int, bias: bool, norm: type[nn.Module] | None, act: type[nn.Module] | None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.norm = norm(out_channels) if norm is not None else nn.Identity()
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


def _both(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def _biases(convolutions: Sequence[Any]) -> list[torch.Tensor] | None:
    """One a convolution, zeros for those that have none; None if none has one."""
    if all(conv.bias is None for conv in convolutions):
        return None
    return [conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias for conv in convolutions]


def _is_projection(parts: Mapping[str, nn.Module | None]) -> bool:
    """Whether the parts of a module are those of a 1x1 convolution, with or without norm and activation behind it."""
    conv, dropout = parts.get("conv"), parts.get("dropout")
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv) is nn.Conv2d  # not one that computes something else
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
        and (dropout is None or not dropout.training or getattr(dropout, "p", 1) == 0)
    )


def _is_fixed(norm: nn.BatchNorm2d) -> bool:
    """Whether the norm is an affine map of numbers that do not depend on the input."""
    return not norm.training and norm.running_mean is not None


def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one convolution that does what both do in evaluation; differentiable."""
    assert norm.running_mean is not None and norm.running_var is not None
    at_least = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = (norm.running_var.to(at_least) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(at_least)
    shift = -norm.running_mean.to(at_least) * scale
    if conv.bias is not None:
        shift = shift + conv.bias.to(at_least) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(at_least)
    weight = conv.weight.to(at_least) * scale.reshape(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


def pointwise_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 1x1 convolution as whichever is fastest: a matrix product, but for training on batches in NCHW.

    Args:
        x: (B, C, H, W).
        weight: (C_out, C, 1, 1).
        bias: (C_out,), or None.

    Returns:
        (B, C_out, H, W), of x's memory format.
    """
    batch, channels, height, width = x.shape
    matrix = weight.flatten(1)
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return functional.linear(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)
    grad = torch.is_grad_enabled()
    if x.numel() > 0 and (not x.is_contiguous() or (batch != 1 and grad)):
        return functional.conv2d(x, weight, bias)
    if batch == 1:
        tokens = x.reshape(channels, height * width)
        out = torch.mm(matrix, tokens) if bias is None else torch.addmm(bias.unsqueeze(-1), matrix, tokens)
    else:
        tokens = x.reshape(batch, channels, height * width)
        out = torch.matmul(matrix, tokens)
        if bias is not None:
            out = out + bias.unsqueeze(-1) if grad else out.add_(bias.unsqueeze(-1))
    return out.reshape(batch, len(weight), height, width)
