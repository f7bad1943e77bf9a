"""What diffusers' attention of DC-AE and of Sana becomes; instances are made by exchanging the class alone."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn import functional

from effattn.functional import relu_linear_attention
from effattn.integrations.lite_mla import scale
from effattn.integrations.structure import Original, any_module, each, made_of, only
from effattn.nn.fold_cache import FoldCache, Folds, cached
from effattn.nn.lite_mla import attend
from effattn.nn.origin import ORIGINAL, is_of
from effattn.nn.projection import (
    can_fold,
    dtype_of_call,
    fold_batch_norm,
    folded_convolution,
    is_dense,
    is_plain,
    kept_weight,
    pointwise_convolution,
    with_weight_in,
)
from effattn.nn.recorded import FxLeaf


class SanaMultiscaleLinearAttention(FxLeaf, FoldCache):
    """LiteMLA with linear layers for projections, as the deep compression autoencoder (arXiv 2410.10733) has it."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_qkv_multiscale: nn.ModuleList
    to_out: nn.Module
    norm_out: nn.Module
    attention_head_dim: int
    eps: float
    norm_type: str
    residual_connection: bool
    nonlinearity: nn.Module
    processor: Any

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        if isinstance(hidden_states, Proxy):
            return self._fx_node(hidden_states)
        if why_not_stock(self, self.__dict__[ORIGINAL]) is not None:
            out: torch.Tensor = self.processor(self, hidden_states)
            return out
        folds = self._folds()
        layers = [self.to_q, self.to_k, self.to_v]
        if all(_is_matrix(layer) and layer.bias is None for layer in layers):
            weights: list[Any] = [layer.weight for layer in layers]
            matrix = kept_weight(folds, "qkv", hidden_states, lambda: torch.cat(weights))
            qkv = pointwise_convolution(hidden_states, matrix, None)
        else:  # adapters, quantised layers
            qkv = torch.cat([_on_channels(layer, hidden_states) for layer in layers], dim=1)
        out = attend(qkv, self.to_qkv_multiscale, head_dim=self.attention_head_dim, eps=self.eps, folds=folds)
        out = self._project(out, folds)
        return out + hidden_states if self.residual_connection else out

    def _project(self, x: torch.Tensor, folds: Folds | None) -> torch.Tensor:
        layer, norm = self.to_out, self.norm_out
        if not _is_matrix(layer):
            x = _on_channels(layer, x)
        elif can_fold(norm):
            dtype = dtype_of_call(x)
            folded = cached(folds, ("out", dtype), lambda: with_weight_in(dtype, fold_batch_norm(layer, norm)))
            return folded_convolution(x, *folded)
        else:
            x = pointwise_convolution(x, layer.weight, layer.bias)
        return _on_channels(norm, x) if self.norm_type == "rms_norm" else norm(x)

    # What a processor asks of its module, as diffusers' class has it.

    def apply_linear_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(B, heads, D, N) of mapped query and key -> (B, heads, D, N) in float32."""
        value = functional.pad(value, (0, 0, 0, 1), value=1.0)
        out = (value @ key.mT @ query).float()
        return out[:, :, :-1] / (out[:, :, -1:] + self.eps)

    def apply_quadratic_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The same, for fewer tokens than channels, in value's dtype."""
        scores = (key.mT @ query).float()
        scores = scores / (scores.sum(dim=2, keepdim=True) + self.eps)
        return value @ scores.to(value.dtype)


def _is_matrix(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer's weight can be used in place of calling it."""
    return isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear) and is_dense(layer.weight)


def _on_channels(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer that takes channels last, on an image."""
    out: torch.Tensor = layer(x.permute(0, 2, 3, 1))
    return out.permute(0, 3, 1, 2)


_SCALE = dict(zip(("proj_in", "proj_out"), scale("attention_head_dim"), strict=True))
_PROCESSOR = "SanaMultiscaleAttnProcessor2_0"
_ASKED_BY_PROCESSORS = ("apply_linear_attention", "apply_quadratic_attention")


def why_not_stock(module: Any, original: type) -> str | None:
    """Why the processor must be called, as diffusers' class does every time, since users set it.

    ``original``: the class that diffusers gave the module; the stock processor stands beside it.
    """
    processor, nonlinearity = type(module.processor), module.nonlinearity
    if processor.__name__ != _PROCESSOR or processor.__module__ != original.__module__:
        return f"its processor is {processor.__name__}, not {_PROCESSOR}"
    if not is_of(processor.__call__, "diffusers"):
        return "the __call__ of its processor was replaced"
    for name in _ASKED_BY_PROCESSORS:
        if name in module.__dict__ or not is_of(getattr(original, name), "diffusers"):
            return f"{name}, which its processor asks for, was replaced"
    return None if is_plain(nonlinearity, nn.ReLU) else f"its nonlinearity is {type(nonlinearity).__name__}, not ReLU"


def _linear_or_adapter(root: Any, part: Any, name: str) -> str | None:
    """What is no linear layer is called: an adapter, a quantised layer."""
    if not isinstance(part, nn.Linear):
        return any_module(root, part, name)
    if type(part) is nn.Linear and part.bias is not None:
        return f"{name} has a bias"
    return only(nn.Linear)(root, part, name)


MULTISCALE = Original(
    {
        "to_q": _linear_or_adapter,
        "to_k": _linear_or_adapter,
        "to_v": _linear_or_adapter,
        "to_qkv_multiscale": each(made_of(("SanaMultiscaleAttentionProjection",), _SCALE)),
        "to_out": _linear_or_adapter,
        "norm_out": any_module,
        "nonlinearity": any_module,
    },
    attributes=("attention_head_dim", "eps", "norm_type", "residual_connection", "processor"),
    check=lambda module: why_not_stock(module, type(module)),
)


class SanaLinearAttnProcessor:
    """The linear attention of Sana's transformer blocks (arXiv 2410.10629)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, C) -> (B, N, C). Like the processor that it stands for, it knows no mask."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        widest = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)  # norms in float32
        heads = [t.to(widest).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value)]
        out = relu_linear_attention(*heads, eps=1e-15).transpose(1, 2).flatten(2).to(hidden_states.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        return out.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else out


def why_not_processor(processor: object) -> str | None:
    """Why this SanaLinearAttnProcessor2_0 cannot be replaced; None if it can."""
    if not is_of(type(processor).__call__, "diffusers"):
        return "it is not diffusers' own"
    return f"it keeps {', '.join(vars(processor))}" if vars(processor) else None
