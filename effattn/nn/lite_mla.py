"""The attention module of EfficientViT (MIT)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn import functional

from effattn.functional import multi_scale_linear_attention
from effattn.nn.arguments import require_image, require_positive
from effattn.nn.fold_cache import FoldCache, Folds, cached
from effattn.nn.origin import is_genuine
from effattn.nn.projection import (
    at_once_under_autocast,
    calls_in_order,
    can_fold,
    cast_by_autocast,
    dtype_of_call,
    fold_batch_norm,
    folded_convolution,
    is_affine,
    is_autocast,
    is_depthwise,
    is_overridden,
    is_plain,
    is_pointwise,
    kept_weight,
    pointwise_convolution,
    with_weight_in,
)
from effattn.nn.recorded import FxLeaf
from effattn.ops import lite_mla as _lite_mla
from effattn.ops._operator import at_least_float32

# Images of up to so many tokens are taken from input to output by one operator, which keeps them in cache; for larger
# ones torch's matrix products around the attention are faster.
_TOKENS_AT_ONCE = 400
# What makes q, k and v, and the output, by class: timm's, the official one, ours.
PROJECTIONS = ("ConvNormAct", "ConvLayer", "_ConvNormAct")


class LiteMLA(FxLeaf, FoldCache):
    """Lightweight multi-scale linear attention, EfficientViT (arXiv 2205.14756), figure 2.

    A 1x1 convolution to q, k and v, :func:`effattn.multi_scale_linear_attention`, a 1x1 convolution back. Names of
    parts are those of timm's ``efficientvit_mit.LiteMLA`` and of the official ``LiteMLA``, so that either's
    state dict loads. Arguments are timm's.

    In evaluation without gradients, a small image is taken from input to output by one operator, if the module is of
    float32, under autocast too; else 1x1 convolutions are matrix products with the BatchNorm behind them folded in. See
    :class:`effattn.nn.fold_cache.FoldCache` for how long the folded weights are kept.

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
        require_positive(in_channels=in_channels, out_channels=out_channels, dim=dim, heads=heads)
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
        if isinstance(x, Proxy):
            return self._fx_node(x)
        require_image(x)
        folds = self._folds()
        if (
            not torch.is_grad_enabled()
            and (x.dtype == torch.float32 or is_autocast(x))
            and not _is_recorded()
            and x.shape[2] * x.shape[3] <= _TOKENS_AT_ONCE
            and at_once_under_autocast(x)
            and _lite_mla.serves(x)
        ):
            out = self._at_once(cast_by_autocast(x), folds)
            if out is not None:
                return out
        qkv = self._project("qkv", x, folds)
        out = attend(qkv, self.aggreg, head_dim=self.dim, eps=self.eps, kernel=self._kernel_func(), folds=folds)
        return self._project("proj", out, folds)

    def _kernel_func(self) -> nn.Module | None:
        """The map of q and k, where it is not the ReLU that the operators have: of a module that was exchanged."""
        kernel = self._modules.get("kernel_func")
        return None if kernel is None or is_plain(kernel, nn.ReLU) else kernel

    def _at_once(self, x: torch.Tensor, folds: Folds | None) -> torch.Tensor | None:
        """The module as one operator, for inference; None where something of it needs calling."""
        if self._kernel_func() is not None:
            return None
        found = cached(folds, "at once", self._all_weights)
        if found is None:
            return None
        weights, act = found
        require_image(x, weights.qkv_weight.shape[1])
        out = _lite_mla.lite_mla(x, weights, self.dim, self.eps)
        return out if act is None else act(out)

    def _all_weights(self) -> tuple[_lite_mla.Weights, nn.Module | None] | None:
        """Of the one operator, and the activation behind it; None if the module is not all plain and float32."""
        parts: list[Any] = [self._modules["qkv"], self._modules["proj"]]
        pairs = _plain_pairs(self.aggreg._modules.values())
        first, last = (part._modules for part in parts)
        if (
            pairs is None
            or len(pairs) > _lite_mla.MAX_SCALES
            or not all(_is_projection(part) and is_affine(part._modules.get("norm")) for part in parts)
            or not _is_nothing(first.get("act"))
            or any(t.dtype != torch.float32 for t in self.parameters())
        ):
            return None
        depthwise, pointwise = ([pair[i] for pair in pairs] for i in (0, 1))
        weights = _lite_mla.Weights(
            *_matrix_and_bias(first["conv"], first.get("norm")),
            [conv.weight for conv in depthwise],
            [conv.weight for conv in pointwise],
            _biases(depthwise) or (),
            _biases(pointwise) or (),
            *_matrix_and_bias(last["conv"], last.get("norm")),
        )
        act = last.get("act")
        return weights, None if _is_nothing(act) else act

    def _project(self, name: str, x: torch.Tensor, folds: Folds | None) -> torch.Tensor:
        """A part made of a 1x1 convolution, a norm and an activation, as a matrix product where that can be."""
        part = self._modules[name]
        assert part is not None
        if not _is_projection(part):
            projected: torch.Tensor = part(x)
            return projected
        parts = part._modules  # looked up directly: at 14x14 tokens the searches of nn.Module show
        conv, norm, act = parts["conv"], parts.get("norm"), parts.get("act")
        assert isinstance(conv, nn.Conv2d)
        if can_fold(norm) and not _is_nothing(norm):
            dtype = dtype_of_call(x)
            folded = cached(folds, (name, dtype), lambda: with_weight_in(dtype, fold_batch_norm(conv, norm)))
            out = folded_convolution(x, *folded)
        else:
            out = pointwise_convolution(x, kept_weight(folds, name, x, lambda: conv.weight), conv.bias)
            out = out if norm is None else norm(out)
        return out if act is None else act(out)


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


def attend(
    qkv: torch.Tensor,
    scales: nn.ModuleList,
    *,
    head_dim: int,
    eps: float,
    kernel: Callable[[torch.Tensor], torch.Tensor] | None = None,
    folds: Folds | None = None,
) -> torch.Tensor:
    """:func:`effattn.multi_scale_linear_attention` with the weights of modules.

    Args:
        qkv: (B, 3 * heads * head_dim, H, W).
        scales: a module a scale, of the depthwise and the 1x1 convolution. If any is no plain convolution any more (an
            adapter took its place, it has hooks), all are called, one by one.
        head_dim: channels of a head.
        eps: added to the denominator.
        kernel: the map of q and k; by default ReLU.
        folds: keeps the weights as the operator takes them, if there are any.

    Returns:
        (B, (1 + S) * heads * head_dim, H, W).
    """
    weights = None if kernel is not None else cached(folds, "scales", lambda: _scale_weights(scales, folds is not None))
    if weights is None:
        return _attend_to_any(qkv, scales, head_dim, eps, kernel)
    return multi_scale_linear_attention(qkv, *weights, head_dim=head_dim, eps=eps)


def _scale_weights(scales: nn.ModuleList, are_kept: bool) -> tuple[list[torch.Tensor] | None, ...] | None:
    """Weights of the depthwise and the 1x1 convolutions, then their biases; None where something must be called.

    ``are_kept``: for many calls, so in the dtype of the operator; autograd goes through the cast of each call.
    """
    pairs = _plain_pairs(scales._modules.values())
    if pairs is None:
        return None
    depthwise, pointwise = ([pair[i] for pair in pairs] for i in (0, 1))
    weights = ([conv.weight for conv in depthwise], [conv.weight for conv in pointwise])
    lists = (*weights, _biases(depthwise), _biases(pointwise))
    return tuple(None if ts is None else [at_least_float32(t) for t in ts] for ts in lists) if are_kept else lists


def _attend_to_any(
    qkv: torch.Tensor, scales: nn.ModuleList, head_dim: int, eps: float, kernel: Callable[..., Any] | None
) -> torch.Tensor:
    batch, _, height, width = qkv.shape
    aggregated = torch.cat([qkv, *(scale(qkv) for scale in scales)], dim=1)
    if kernel is None:
        return multi_scale_linear_attention(aggregated, [], [], head_dim=head_dim, eps=eps)
    heads = aggregated.reshape(batch, -1, 3 * head_dim, height * width).transpose(-2, -1)
    q, k, v = heads.chunk(3, dim=-1)
    out = _linear_attention(kernel(q), kernel(k), v, eps)
    return out.transpose(-2, -1).reshape(batch, -1, height, width)


def _linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """Of mapped q and k; sums in float32, as the originals have them."""
    dtype, at_least = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v = (t.to(at_least) for t in (q, k, v))
    with torch.autocast(v.device.type, enabled=False) if is_autocast(v) else nullcontext():
        out = q @ (k.mT @ functional.pad(v, (0, 1), value=1.0))
    return (out[..., :-1] / (out[..., -1:] + eps)).to(dtype)


def _plain_pairs(scales: Iterable[Any]) -> list[tuple[Any, ...]] | None:
    """The two convolutions of each scale, or None where something must be called."""
    pairs = []
    for scale in scales:
        pair = tuple(scale._modules.values())
        if not calls_in_order(scale) or len(pair) != 2 or not all(is_plain(conv, nn.Conv2d) for conv in pair):
            return None
        if not is_depthwise(pair[0]) or not is_pointwise(pair[1], pair[1].groups):
            return None
        pairs.append(pair)
    return pairs


def _biases(convolutions: Sequence[nn.Conv2d]) -> list[torch.Tensor] | None:
    """One a convolution, zeros for those that have none; None if none has one."""
    if all(conv.bias is None for conv in convolutions):
        return None
    return [conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias for conv in convolutions]


def _is_projection(part: nn.Module) -> bool:
    """Whether a module is a 1x1 convolution, with or without norm and activation behind it, and nothing else."""
    conv, dropout = part._modules.get("conv"), part._modules.get("dropout")
    return (
        type(part).__name__ in PROJECTIONS
        and is_genuine(type(part))
        and not is_overridden(part)
        and isinstance(conv, nn.Conv2d)
        and is_plain(conv, nn.Conv2d)
        and is_pointwise(conv)
        and (dropout is None or _is_idle(dropout))
    )


def _is_idle(dropout: nn.Module) -> bool:
    kinds = (nn.Dropout, nn.Dropout2d)
    return any(is_plain(dropout, kind) for kind in kinds) and (not dropout.training or getattr(dropout, "p", 1) == 0)


def _is_nothing(part: nn.Module | None) -> bool:
    return part is None or type(part) is nn.Identity


def _is_recorded() -> bool:
    """Whether a graph is made that must serve images of other sizes too."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _matrix_and_bias(conv: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Without a norm, whatever bias there is, or none."""
    weight, bias = (conv.weight, conv.bias) if _is_nothing(norm) else fold_batch_norm(conv, norm)
    # Detached: a view of a parameter that is kept would keep torch from swapping the parameter.
    return weight.detach().flatten(1), bias
