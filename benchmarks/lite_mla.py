"""Cases of LiteMLA and of the block of DC-AE around it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.floor import Work
from benchmarks.modules import NO_FLOOR
from effattn import _library, testing


@dataclass(frozen=True)
class LiteMLACase:
    """A module of a real model and the image that reaches it."""

    name: str
    batch: int
    channels: int
    dim: int
    height: int
    width: int
    dynamo_export = False

    def module(self) -> nn.Module:
        testing.import_timm()
        from timm.models.efficientvit_mit import LiteMLA

        return LiteMLA(self.channels, self.channels, dim=self.dim, norm_layer=(None, nn.BatchNorm2d))

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.height, self.width

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "batch": self.batch,
            "channels": self.channels,
            "dim": self.dim,
            "height": self.height,
            "width": self.width,
        }

    def work(self, training: bool) -> Work:
        """The arithmetic of the four convolutions and the attention, and its bytes: x, the output, the weights."""
        if _library._C is None:
            raise RuntimeError(f"the compiled library of effattn cannot be loaded: {_library.error}")
        c, d, tokens = self.channels, self.dim, self.batch * self.height * self.width
        heads, kernels = c // d, (5,)
        aggregation = _library._C.multi_scale_plan(
            batch=self.batch, heads=heads, head_dim=d, height=self.height, width=self.width, kernels=kernels
        )["flops_aggregation"]
        groups = self.batch * heads * (1 + len(kernels))
        attention = _library._C.relu_linear_attention_plan(
            groups=groups,
            queries=self.height * self.width,
            keys=self.height * self.width,
            head_dim=d,
            value_dim=d,
            dtype="float32",
        )["flops_forward"]
        projections = 3 * c * c + (1 + len(kernels)) * c * c
        flops = aggregation + attention + 2 * tokens * projections
        passes = 3 if training else 1  # a gradient of the inputs and one of the weights cost a forward pass each
        return Work(bytes=4 * passes * (2 * tokens * c + projections), flops=passes * flops)


@dataclass(frozen=True)
class DCAEBlockCase:
    """A block of diffusers' deep compression autoencoder (arXiv 2410.10733): the attention and a gated MBConv."""

    name: str
    batch: int
    channels: int
    dim: int
    height: int
    width: int
    dynamo_export = True  # of movedim()

    def module(self) -> nn.Module:
        testing.import_diffusers()
        from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock

        return EfficientViTBlock(self.channels, attention_head_dim=self.dim, norm_type="rms_norm")

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.height, self.width

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "channels": self.channels, "height": self.height, "width": self.width}

    def work(self, training: bool) -> Work:
        return NO_FLOOR
