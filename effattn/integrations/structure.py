"""What the checks of all modules ask: why a module's structure is not the one that its replacement works on."""

from __future__ import annotations

from typing import Any

from torch import nn

from effattn.nn.projection import is_overridden


def why_not_named(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Where attributes are missing, or nothing can be exchanged."""
    missing = [name for name in names if not hasattr(module, name)]
    return f"it has no {', '.join(missing)}" if missing else None


def why_not_its_own(module: nn.Module, names: set[str]) -> str | None:
    """Where a module has parts that the original has not, it does something else."""
    others = [name for name, _ in module.named_children() if name not in names]
    return f"it has parts that the original has not: {', '.join(others)}" if others else None


def why_not_its_parts(module: nn.Module) -> str | None:
    """Where something listens to the parts of a module they are called one by one, and nothing would be gained."""
    hooked = [name for name, part in module.named_modules() if name and is_overridden(part)]
    return f"its parts have hooks or forwards of their own: {', '.join(hooked)}" if hooked else None


def normed_convolution(part: nn.Module | None, *, activated: bool = False) -> nn.Conv2d | None:
    """The convolution of a part that is one with a BatchNorm behind it; ``activated``: and an activation in front."""
    parts: list[Any] = [] if part is None else list(part.children())
    if len(parts) != (3 if activated else 2):
        return None
    conv, norm = parts[-2:]
    plain = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and conv.padding_mode == "zeros"
    return conv if plain else None


def is_pointwise(conv: nn.Conv2d | None) -> bool:
    """Whether a convolution is a matrix product of channels."""
    return (
        conv is not None
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
        and conv.groups == 1
    )


def is_depthwise(conv: nn.Conv2d | None, channels: int, stride: int = 1) -> bool:
    """Whether a convolution takes every channel alone, with an odd square kernel that keeps the size, or divides it."""
    if conv is None:
        return False
    kernel = conv.kernel_size[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels == channels
        and conv.kernel_size == (kernel, kernel)
        and kernel % 2 == 1
        and conv.stride == (stride, stride)
        and conv.dilation == (1, 1)
        and conv.padding in ((kernel // 2, kernel // 2), "same")
        and conv.padding_mode == "zeros"
    )
