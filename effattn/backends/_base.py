"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

#: Sizes of a call that backends may have a limit for, by the limit's name; several sizes may have the same.
NamedSizes = Sequence[tuple[str, int]]


class Backend(NamedTuple):
    """A way to compute; see :mod:`effattn.registry` for how one is chosen."""

    name: str
    #: Why nothing can be served on this machine, or None.
    unavailable: Callable[[], str | None]
    #: Every reason why (op, device, dtype, sizes) cannot be served; None for an op is any.
    reasons: Callable[[str | None, torch.device, torch.dtype, NamedSizes], list[str]]
    #: Where its torch operators are; None of the reference, which has the plain formulations.
    namespace: str | None = None
    #: Of kernels for GPUs: what they are made of, so that no verdict about others counts (:mod:`effattn.verdicts`).
    identity: Callable[[], str] | None = None


def refused_dtype(dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> list[str]:
    """The refusal of a dtype that is not among them, or []."""
    if dtype in dtypes:
        return []
    got, *names = (str(d).removeprefix("torch.") for d in (dtype, *dtypes))
    return [f"takes {', '.join([*names[:-2], ' and '.join(names[-2:])])}, not {got}"]


#: What each size is called, in the words of a refusal; "a window width of up to 64" for a name without an entry.
_PHRASES = {
    "channels": "heads of up to {0} channels",
    "dimensions": "tensors of up to {0} dimensions",
    "kernel": "convolutions of up to {0} x {0}",
    "scales": "up to {0} scales",
    "heads": "cascades of up to {0} heads",
    "talking_heads": "up to {0} talking heads",
}


def beyond(sizes: NamedSizes, limits: Mapping[str, int]) -> list[str]:
    """What of a call is more than a backend takes, each as "takes heads of up to 128 channels, not 129".

    Args:
        limits: the most that the backend takes, by name; no entry where anything goes.
    """
    return [
        f"takes {_PHRASES.get(name, 'a {1} of up to {0}').format(limits[name], name.replace('_', ' '))}, not {size}"
        for name, size in sizes
        if name in limits and size > limits[name]
    ]
