"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Fused(NamedTuple):
    """The torch operators behind one function of a backend with kernels of its own.

    ``inference`` returns the output alone and has no autograd formula; ``forward`` returns what the
    backward needs beside it and has one. They are one and the same of an operator for training alone.
    """

    inference: Callable[..., torch.Tensor]
    forward: Callable[..., tuple[torch.Tensor, ...]]


class Backend(NamedTuple):
    """A way to compute; see :mod:`effattn.registry` for how one is chosen."""

    name: str
    #: Why nothing can be served on this machine, or None.
    unavailable: Callable[[], str | None]
    #: Every reason why (op, device, dtype, sizes) cannot be served; sizes as in :mod:`effattn.backends._sizes`.
    reasons: Callable[[str, torch.device, torch.dtype, tuple[int, ...]], list[str]]
    #: By operator: a Fused; of the reference, a function of differentiable torch operations; of an operator that is
    #: for inference alone, that.
    functions: Mapping[str, Fused | Callable[..., torch.Tensor]]
    #: Of kernels for cards: what they are made of, so that no verdict about others counts (:mod:`effattn.verdicts`).
    identity: Callable[[], str] | None = None
