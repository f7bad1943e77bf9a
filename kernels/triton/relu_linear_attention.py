"""The kernels of relu_linear_attention, of which others are made too."""

from __future__ import annotations

from effattn._triton.linear_attention import backward, forward

__all__ = ["backward", "forward"]
