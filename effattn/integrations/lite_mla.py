"""LiteMLA, the multi-scale linear attention module of EfficientViT (MIT).

timm and the official repository build it alike: ``qkv`` (1x1 convolution), ``aggreg`` (a depthwise and a
grouped 1x1 convolution a scale), ReLU linear attention over the heads of all scales, ``proj``.
"""

from __future__ import annotations

import torch
from torch import nn

from effattn.functional import relu_linear_attention


def why_not(module: nn.Module) -> str | None:
    """Why this module, of a class named LiteMLA, cannot be replaced; None if it can."""
    missing = [name for name in ("qkv", "aggreg", "proj", "kernel_func", "dim", "eps") if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if not isinstance(module.kernel_func, nn.ReLU):
        return f"its kernel function is {type(module.kernel_func).__name__}, not ReLU"
    return None


class AcceleratedLiteMLA(nn.Module):
    """A LiteMLA whose attention is one fused operator; made by ``accelerate``, never constructed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C_out, H, W)."""
        batch, _, height, width = x.shape
        qkv = self.qkv(x)
        scales = torch.cat([qkv, *(aggregate(qkv) for aggregate in self.aggreg)], dim=1)
        # Heads of all scales: (B, heads, 3 D, N), tokens contiguous, which the operator reads as it lies.
        heads = scales.reshape(batch, -1, 3 * self.dim, height * width).transpose(-1, -2)
        out = relu_linear_attention(*heads.chunk(3, dim=-1), eps=self.eps)
        return self.proj(out.transpose(-1, -2).reshape(batch, -1, height, width))
