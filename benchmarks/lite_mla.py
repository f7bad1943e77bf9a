"""Cases of LiteMLA and of the block of DC-AE around it."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.floor import Work
from benchmarks.linear_attention import AttentionCase, work
from benchmarks.modules import ModuleCase
from effattn import testing


def lite_mla(name: str, batch: int, channels: int, dim: int, height: int, width: int) -> ModuleCase:
    """A module of a real model and the image that reaches it."""

    def make() -> nn.Module:
        testing.import_timm()
        from timm.models.efficientvit_mit import LiteMLA

        return LiteMLA(channels, channels, dim=dim, norm_layer=(None, nn.BatchNorm2d))

    sizes = {"batch": batch, "channels": channels, "dim": dim, "height": height, "width": width}
    return ModuleCase(name, make, (batch, channels, height, width), sizes, lambda: _work(**sizes))


def _work(batch: int, channels: int, dim: int, height: int, width: int) -> Work:
    """The arithmetic of the four convolutions and the attention, and its bytes: x, the output, the weights."""
    kernel, tokens = 5, batch * height * width
    attention = work(AttentionCase("", batch, 2 * channels // dim, dim, height, width), torch.float32, False)
    aggregation = 2 * tokens * 3 * channels * (kernel**2 + dim)
    projections = 5 * channels**2
    return Work(4 * (2 * tokens * channels + projections), aggregation + attention.flops + 2 * tokens * projections)


def dc_ae_block(name: str, batch: int, channels: int, dim: int, height: int, width: int) -> ModuleCase:
    """A block of diffusers' deep compression autoencoder (arXiv 2410.10733): the attention and a gated MBConv."""

    def make() -> nn.Module:
        testing.import_diffusers()
        from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock

        return EfficientViTBlock(channels, attention_head_dim=dim, norm_type="rms_norm")

    sizes = {"batch": batch, "channels": channels, "height": height, "width": width}
    # The older exporter knows no movedim().
    return ModuleCase(name, make, (batch, channels, height, width), sizes, dynamo_export=True)
