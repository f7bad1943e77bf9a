"""Cases of cascaded group attention and of EfficientFormer's attention, as modules of real models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.floor import Work
from effattn import testing


@dataclass(frozen=True)
class CascadeModule:
    """EfficientViT (Microsoft): a LocalWindowAttention and the image that reaches it."""

    name: str
    batch: int
    channels: int
    size: int
    kernels: tuple[int, ...]
    key_dim = 16
    window = 7
    dynamo_export = False

    def module(self) -> nn.Module:
        testing.import_timm()
        from timm.models.efficientvit_msra import LocalWindowAttention

        heads = len(self.kernels)
        return LocalWindowAttention(
            self.channels,
            self.key_dim,
            heads,
            attn_ratio=self.channels // heads / self.key_dim,
            resolution=self.size,
            window_resolution=self.window,
            kernels=self.kernels,
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.size, self.size

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "channels": self.channels, "size": self.size, "heads": len(self.kernels)}

    def work(self, training: bool) -> Work:
        """Projections, depthwise convolutions and attention; bytes of x, the output and the weights."""
        side = min(self.window, self.size)
        windows, in_window = self.batch * (-(-self.size // side)) ** 2, side**2
        d, keys = self.channels // len(self.kernels), self.key_dim
        of_a_token = sum(d * (2 * keys + d) + k * k * keys + in_window * (keys + d) for k in self.kernels)
        flops = 2 * windows * in_window * (of_a_token + self.channels**2)
        weights = sum(d * (2 * keys + d) + k * k * keys for k in self.kernels) + self.channels**2
        tokens = self.batch * self.size**2
        return _work(flops, 2 * tokens * self.channels + weights, training)


@dataclass(frozen=True)
class EfficientFormerModule:
    """The attention of EfficientFormer on 7x7 tokens."""

    name: str
    batch: int
    channels: int
    heads = 8
    key_dim = 32
    value_dim = 128
    tokens = 49
    dynamo_export = False

    def module(self) -> nn.Module:
        testing.import_timm()
        from timm.models.efficientformer import Attention

        return Attention(self.channels, self.key_dim, self.heads, self.value_dim // self.key_dim, resolution=7)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.tokens, self.channels

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "channels": self.channels, "tokens": self.tokens}

    def work(self, training: bool) -> Work:
        """Projections and attention; bytes of x, the output and the weights."""
        tokens, outputs = self.batch * self.tokens, self.heads * (2 * self.key_dim + self.value_dim)
        weights = self.channels * (outputs + self.heads * self.value_dim)
        attention = self.heads * self.tokens * (self.key_dim + self.value_dim)
        return _work(2 * tokens * (weights + attention), 2 * tokens * self.channels + weights, training)


@dataclass(frozen=True)
class EfficientFormerV2Module:
    """An attention of EfficientFormerV2: at the image's resolution, below it (``stride``), or halving it."""

    name: str
    batch: int
    channels: int
    size: int
    stride: int | None = None
    out_channels: int | None = None  # of the one that halves
    heads = 8
    dynamo_export = False

    def module(self) -> nn.Module:
        testing.import_timm()
        from timm.models.efficientformer_v2 import Attention2d, Attention2dDownsample

        if self.out_channels is not None:
            return Attention2dDownsample(self.channels, resolution=self.size, out_dim=self.out_channels)
        return Attention2d(self.channels, resolution=self.size, stride=self.stride)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.size, self.size

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "channels": self.channels, "size": self.size}

    def work(self, training: bool) -> Work:
        """The three products, the values' depthwise convolution, the attention and its talking heads."""
        halves, c, out = self.out_channels is not None, self.channels, self.out_channels or self.channels
        keys = (16 if halves else 32) * self.heads
        values = 4 * keys
        image = self.size**2
        k_tokens = image if halves or self.stride is None else -((-self.size // self.stride) ** 2)
        q_tokens = (-(-self.size // 2)) ** 2 if halves else k_tokens
        projected_tokens = q_tokens if halves else image
        flops = q_tokens * keys * c + k_tokens * (keys + values) * c + projected_tokens * values * out
        flops += q_tokens * k_tokens * (keys + values + (0 if halves else 2 * self.heads**2)) + q_tokens * 9 * values
        weights = (2 * keys + values) * c + 9 * values + values * out
        return _work(2 * self.batch * flops, self.batch * (image * c + projected_tokens * out) + weights, training)


def _work(flops: int, floats: int, training: bool) -> Work:
    passes = 3 if training else 1  # a gradient of the inputs and one of the weights cost a forward pass each
    return Work(bytes=4 * passes * floats, flops=passes * flops)


AnyModule = CascadeModule | EfficientFormerModule | EfficientFormerV2Module
