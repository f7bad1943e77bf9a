"""BatchNorm in training, where an operator takes the batch's statistics itself."""

from __future__ import annotations

import torch
from torch import nn

from effattn.nn.projection import convolution_and_norm


def training_pair(part: nn.Module | None) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """A part's convolution and the BatchNorm behind it, or None where an operator cannot stand for them."""
    pair = convolution_and_norm(part)
    if pair is None:
        return None
    conv, norm = pair
    if not isinstance(norm, nn.BatchNorm2d):  # one that takes the statistics of other processes too, or none
        return None
    tensors = (conv.weight, norm.weight, norm.bias)
    if not norm.training or norm.eps <= 0 or conv.bias is not None:
        return None
    return (conv, norm) if all(t is not None and t.dtype == torch.float32 for t in tensors) else None


def update_running_statistics(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """What a call in training does to a norm's buffers.

    Args:
        mean, variance: of the batch, (channels,); the variance over ``count`` numbers, not corrected.
    """
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    momentum: float | torch.Tensor | None = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the average of all batches
            momentum = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    if momentum is None:
        momentum = 0.0
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), momentum)
