"""What the plain formulations share: torch operations in float32 at least, differentiable to any order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leaves dtypes to the code inside; the meta device knows no autocast and refuses to be asked."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def mix_heads(x: torch.Tensor, matrix_and_bias: Sequence[torch.Tensor]) -> torch.Tensor:
    """A 1x1 convolution over the heads of (B, heads, N, M), or nothing."""
    if not matrix_and_bias:
        return x
    matrix, bias = (t.to(x.dtype) for t in matrix_and_bias)
    return torch.einsum("gh,bhnm->bgnm", matrix, x) + bias.reshape(-1, 1, 1)


def project(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 1x1 convolution with a weight (outputs, inputs), for images that may be empty."""
    with without_autocast(image.device):
        bias = None if bias is None else bias.to(image.dtype)
        return functional.linear(image.movedim(1, -1), weight.to(image.dtype), bias).movedim(-1, 1)


def depthwise(image: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor | None, stride: int = 1) -> torch.Tensor:
    """A depthwise convolution with taps (channels, 1, k, k) or (channels, k * k)."""
    side = math.isqrt(math.prod(taps.shape[1:]))
    bias = None if bias is None else bias.to(image.dtype)
    taps = taps.reshape(-1, 1, side, side).to(image.dtype)
    with without_autocast(image.device):
        return functional.conv2d(image, taps, bias, stride, side // 2, groups=taps.shape[0])
