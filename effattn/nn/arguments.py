"""What the modules ask of their arguments."""

from __future__ import annotations

import torch


def require_positive(**sizes: float) -> None:
    """Raises ValueError with the name of the first that is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns, from both or from the side of a square."""
    return (value, value) if isinstance(value, int) else value


def require_image(x: torch.Tensor, channels: int | None = None) -> None:
    """Raises TypeError or ValueError unless x is (B, C, H, W), of so many channels where they are known."""
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.dim() != 4 or (channels is not None and x.shape[1] != channels):
        raise ValueError(f"x: expected shape (B, {channels or 'C'}, H, W), got {tuple(x.shape)}")
