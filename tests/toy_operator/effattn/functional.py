"""What stands in effattn/functional.py, among the other functions."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function

from effattn.ops import OPERATORS


def squared_relu(x: torch.Tensor, weight: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    r"""The square of a ReLU, times a weight a channel.

    .. math:: out_c = scale \cdot weight_c \cdot relu(x_c)^2

    Primer (arXiv 2109.08668), section 4.1. Deterministic, and differentiable to any order.

    Args:
        x: (B, C, H, W), NCHW or channels_last, float16, bfloat16, float32 or float64.
        weight: (C,), of x's dtype or float32.
        scale: of all channels, finite.

    Returns:
        (B, C, H, W), of x's dtype and memory format.

    Raises:
        TypeError: for anything but dense floating-point tensors of fitting dtypes.
        ValueError: for sizes that do not fit, different devices, or a scale that is not finite.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(squared_relu, (x, weight), x, weight, scale=scale)
    return OPERATORS["squared_relu"](x, weight, scale)
