"""What the modules ask of their arguments."""

from __future__ import annotations


def require_positive(**sizes: float) -> None:
    """Raises ValueError with the name of the first that is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns, from both or from the side of a square."""
    return (value, value) if isinstance(value, int) else value
