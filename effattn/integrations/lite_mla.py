"""What a LiteMLA of timm or of the official repository is made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from effattn.integrations.structure import (
    Check,
    Depthwise,
    Original,
    Pointwise,
    any_module,
    convolution,
    convolution_in,
    each,
    in_order,
    made_of,
    maybe,
    only,
)
from effattn.nn.lite_mla import PROJECTIONS


def _convolution_or_adapter(root: Any, part: Any, name: str) -> str | None:
    """What is no convolution is called: an adapter, a quantised layer."""
    check = convolution(lambda root: Pointwise()) if isinstance(part, nn.Conv2d) else any_module
    return check(root, part, name)


_PROJECTION = made_of(
    PROJECTIONS,
    {
        "dropout": maybe(only(nn.Dropout, nn.Dropout2d)),
        "conv": _convolution_or_adapter,
        "norm": maybe(any_module),
        "act": maybe(any_module),
    },
    optional=("dropout", "norm", "act"),
)


def scale(head_dim: str) -> tuple[Check, Check]:
    """The two convolutions of a scale, in groups of as many channels as an attribute of this name says."""

    def mixing(root: Any) -> Pointwise:
        channels = _channels(root)
        return Pointwise(channels, channels, channels // getattr(root, head_dim))

    return convolution(lambda root: Depthwise(_channels(root))), convolution(mixing)


def _channels(root: Any) -> int:
    """Of q, k and v of all heads together; one number for all scales."""
    grouped = (part.in_channels for part in root.modules() if isinstance(part, nn.Conv2d) and part.groups > 1)
    return next(grouped, 0)


def _why_not_its_heads(module: Any) -> str | None:
    channels = _channels(module)
    return None if channels % (3 * module.dim) == 0 else f"{channels} channels, not a multiple of 3 * {module.dim}"


LITE_MLA = Original(
    {
        "qkv": _PROJECTION,
        "aggreg": each(in_order(*scale("dim"))),
        "proj": _PROJECTION,
        "kernel_func": only(nn.ReLU),
    },
    attributes=("dim", "eps"),
    example=lambda m: (1, convolution_in(m.qkv).in_channels, 5, 7),
    check=_why_not_its_heads,
)
