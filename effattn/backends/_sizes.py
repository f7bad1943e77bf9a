"""The sizes of a call that a backend may have a limit for: of each operator the same few, in one order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: What each size is called, in the words of a refusal.
_PHRASES = {
    "channels": "heads of up to {0} channels",
    "dimensions": "tensors of up to {0} dimensions",
    "kernel": "convolutions of up to {0} x {0}",
    "scales": "up to {0} scales",
    "heads": "cascades of up to {0} heads",
    "talking_heads": "up to {0} heads that talk",
}
_MULTI_SCALE = ("channels", "kernel", "scales")
#: By operator, the sizes that its calls tell the registry; of others, none.
SIZES: dict[str, tuple[str, ...]] = {
    "relu_linear_attention": ("channels", "channels", "dimensions"),
    "multi_scale_aggregation": _MULTI_SCALE,
    "multi_scale_linear_attention": _MULTI_SCALE,
    "cascaded_group_attention": ("channels", "channels", "kernel", "heads"),
    "biased_attention": ("channels", "channels", "talking_heads"),
}


def described(op: str, limits: Mapping[str, int]) -> list[str]:
    """The limits of a backend that count for an operator, each as "heads of up to 128 channels"."""
    return [_PHRASES[name].format(limits[name]) for name in dict.fromkeys(SIZES.get(op, ())) if name in limits]


def beyond(op: str, sizes: Sequence[int], limits: Mapping[str, int]) -> list[str]:
    """What of a call is more than a backend takes, each as "heads of up to 128 channels, not 129".

    Args:
        op: the operator.
        sizes: those of the call, in the order of ``SIZES``.
        limits: the most that the backend takes, by name; no entry where anything goes.
    """
    return [
        f"{_PHRASES[name].format(limits[name])}, not {size}"
        for name, size in zip(SIZES.get(op, ()), sizes, strict=False)
        if name in limits and size > limits[name]
    ]
