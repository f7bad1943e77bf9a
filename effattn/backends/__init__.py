"""The backends, in the order in which the registry asks them.

A backend says what it supports and how it is launched. ``functions`` maps an operator's name to its
launch: for a fused backend the operators of :class:`Fused` (or the operator itself, of a function that is for
inference alone), for the reference a plain function.
"""

from __future__ import annotations

import torch

from effattn.backends import cpu, cuda, reference, triton
from effattn.backends._base import Backend, Fused

ORDER: tuple[Backend, ...] = (cpu.BACKEND, triton.BACKEND, cuda.BACKEND, reference.BACKEND)
_CUDA_FIRST = (cpu.BACKEND, cuda.BACKEND, triton.BACKEND, reference.BACKEND)


def order(op: str, device: torch.device) -> tuple[Backend, ...]:
    """The order for an operator on a device: CUDA before Triton where that was measured to be faster."""
    return _CUDA_FIRST if cuda.is_preferred(op, device) else ORDER


__all__ = ["ORDER", "Backend", "Fused", "order"]
