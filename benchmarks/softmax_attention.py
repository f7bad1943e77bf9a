"""Cases of cascaded group attention and of EfficientFormer's attention, as modules of real models."""

from __future__ import annotations

from torch import nn

from benchmarks.floor import Work
from benchmarks.modules import ModuleCase
from effattn import testing


def cascade(name: str, batch: int, channels: int, size: int, kernels: tuple[int, ...]) -> ModuleCase:
    """EfficientViT (Microsoft): a LocalWindowAttention and the image that reaches it."""
    heads, keys, window = len(kernels), 16, 7
    d = channels // heads

    def make() -> nn.Module:
        testing.import_timm()
        from timm.models.efficientvit_msra import LocalWindowAttention

        return LocalWindowAttention(
            channels, keys, heads, d / keys, resolution=size, window_resolution=window, kernels=kernels
        )

    def work() -> Work:
        """Projections, depthwise convolutions and attention; bytes of x, the output and the weights."""
        side = min(window, size)
        windows, in_window = batch * (-(-size // side)) ** 2, side**2
        of_a_token = sum(d * (2 * keys + d) + k * k * keys + in_window * (keys + d) for k in kernels)
        flops = 2 * windows * in_window * (of_a_token + channels**2)
        weights = sum(d * (2 * keys + d) + k * k * keys for k in kernels) + channels**2
        return Work(4 * (2 * batch * size**2 * channels + weights), flops)

    sizes = {"batch": batch, "channels": channels, "size": size, "heads": heads}
    return ModuleCase(name, make, (batch, channels, size, size), sizes, work)


def efficientformer(name: str, batch: int, channels: int) -> ModuleCase:
    """The attention of EfficientFormer on 7x7 tokens."""
    heads, key_dim, value_dim, tokens = 8, 32, 128, 49

    def make() -> nn.Module:
        testing.import_timm()
        from timm.models.efficientformer import Attention

        return Attention(channels, key_dim, heads, value_dim // key_dim, resolution=7)

    def work() -> Work:
        """Projections and attention; bytes of x, the output and the weights."""
        weights = channels * heads * (2 * key_dim + value_dim + value_dim)
        attention = heads * tokens * (key_dim + value_dim)
        return Work(4 * (2 * batch * tokens * channels + weights), 2 * batch * tokens * (weights + attention))

    sizes = {"batch": batch, "channels": channels, "tokens": tokens}
    return ModuleCase(name, make, (batch, tokens, channels), sizes, work)


def efficientformer_v2(
    name: str, batch: int, channels: int, size: int, stride: int | None = None, out_channels: int | None = None
) -> ModuleCase:
    """An attention of EfficientFormerV2: at the image's resolution, below it, or halving it, to ``out_channels``."""
    halves, heads, out = out_channels is not None, 8, out_channels or channels

    def make() -> nn.Module:
        testing.import_timm()
        from timm.models.efficientformer_v2 import Attention2d, Attention2dDownsample

        if halves:
            return Attention2dDownsample(channels, resolution=size, out_dim=out)
        return Attention2d(channels, resolution=size, stride=stride)

    def work() -> Work:
        """The three products, the values' depthwise convolution, the attention and its talking heads."""
        keys, image = (16 if halves else 32) * heads, size**2
        values = 4 * keys
        k_tokens = image if halves or stride is None else -((-size // stride) ** 2)
        q_tokens = (-(-size // 2)) ** 2 if halves else k_tokens
        projected_tokens = q_tokens if halves else image
        flops = q_tokens * keys * channels + k_tokens * (keys + values) * channels + projected_tokens * values * out
        flops += q_tokens * k_tokens * (keys + values + (0 if halves else 2 * heads**2)) + q_tokens * 9 * values
        weights = (2 * keys + values) * channels + 9 * values + values * out
        return Work(4 * (batch * (image * channels + projected_tokens * out) + weights), 2 * batch * flops)

    sizes = {"batch": batch, "channels": channels, "size": size}
    return ModuleCase(name, make, (batch, channels, size, size), sizes, work)
