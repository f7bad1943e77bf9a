"""What the plain formulations share: torch operations in float32 at least, differentiable to any order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional

from effattn._tracing import static_shape


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


def partition(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) -> (windows, C, *size), with zeros below and right of the image."""
    _, channels, *whole = static_shape(x)
    if tuple(whole) == size:
        return x
    (batch, _, height, width), (rows, cols) = x.shape, size
    down, across = (height + rows - 1) // rows, (width + cols - 1) // cols
    padded = functional.pad(x, (0, across * cols - width, 0, down * rows - height))
    windows = padded.reshape(batch, channels, down, rows, across, cols)
    return windows.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, rows, cols)


def reverse_partition(windows: torch.Tensor, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(windows, C, *size) -> (B, C, H, W) with the batch and image size of ``x``."""
    if static_shape(x)[2:] == size:
        return windows
    (batch, _, height, width), (rows, cols), channels = x.shape, size, static_shape(windows)[1]
    down, across = (height + rows - 1) // rows, (width + cols - 1) // cols
    tiles = windows.reshape(batch, down, across, channels, rows, cols).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(batch, channels, down * rows, across * cols)[:, :, :height, :width]
