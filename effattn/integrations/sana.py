"""What diffusers' attention of DC-AE and of Sana becomes; instances are made by exchanging the class alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Proxy

from effattn.functional import relu_linear_attention
from effattn.integrations.lite_mla import why_not_a_scale
from effattn.integrations.structure import why_not_its_parts
from effattn.nn.lite_mla import attend
from effattn.nn.projection import KeepsDerived, can_fold, is_plain, pointwise_convolution
from effattn.nn.recorded import FxLeaf


class SanaMultiscaleLinearAttention(FxLeaf, KeepsDerived):
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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        if isinstance(hidden_states, Proxy):
            return self._fx_node(hidden_states)
        layers = [self.to_q, self.to_k, self.to_v]
        if all(is_plain(layer, nn.Linear) for layer in layers):
            weights: list[Any] = [layer.weight for layer in layers]
            matrix = self._derived("qkv", layers, lambda: torch.cat(weights))
            qkv = pointwise_convolution(hidden_states, matrix, None)
        else:  # adapters, quantised layers
            qkv = torch.cat([_on_channels(layer, hidden_states) for layer in layers], dim=1)
        out = attend(qkv, self.to_qkv_multiscale, head_dim=self.attention_head_dim, eps=self.eps)
        out = self._project(out)
        return out + hidden_states if self.residual_connection else out

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        layer, norm = self.to_out, self.norm_out
        if not (isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear)):
            x = _on_channels(layer, x)
        elif can_fold(norm):
            return pointwise_convolution(x, *self._folded("out", layer, norm))
        else:
            x = pointwise_convolution(x, layer.weight, layer.bias)
        return _on_channels(norm, x) if self.norm_type == "rms_norm" else norm(x)


def _on_channels(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer that takes channels last, on an image."""
    out: torch.Tensor = layer(x.permute(0, 2, 3, 1))
    return out.permute(0, 3, 1, 2)


def why_not_multiscale(module: nn.Module) -> str | None:
    """Why this SanaMultiscaleLinearAttention cannot be replaced; None if it can."""
    names = (*SanaMultiscaleLinearAttention.__annotations__, "nonlinearity", "processor")
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    processor = type(module.processor).__name__
    if processor != "SanaMultiscaleAttnProcessor2_0":
        return f"its processor is {processor}, not SanaMultiscaleAttnProcessor2_0"
    if type(module.nonlinearity) is not nn.ReLU:
        return f"its nonlinearity is {type(module.nonlinearity).__name__}, not ReLU"
    if any(getattr(layer, "bias", None) is not None for layer in (module.to_q, module.to_k, module.to_v)):
        return "to_q, to_k or to_v has a bias"
    for i, scale in enumerate(module.to_qkv_multiscale):
        parts = tuple(scale._modules)
        if parts != ("proj_in", "proj_out"):
            return f"to_qkv_multiscale.{i} has parts {parts}, not proj_in and proj_out"
        reason = why_not_a_scale(scale.proj_in, scale.proj_out, module.attention_head_dim)
        if reason is not None:
            return f"to_qkv_multiscale.{i}: {reason}"
    return why_not_its_parts(module)


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
    return f"it keeps {', '.join(vars(processor))}" if vars(processor) else None
