"""The backends, in the order in which the registry asks them.

A backend says what it supports, and in which namespace its torch operators are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from effattn.backends import cpu, cuda, reference, triton
from effattn.backends._base import Backend

ORDER: tuple[Backend, ...] = (cpu.BACKEND, triton.BACKEND, cuda.BACKEND, reference.BACKEND)
_CUDA_FIRST = (cpu.BACKEND, cuda.BACKEND, triton.BACKEND, reference.BACKEND)

#: Elements of a call's activations together below which CUDA is asked before Triton. Triton's launches,
#: two or three a call, cost about 50 us of Python, a call in C++ a few: where the GPU needs less, Python decides how
#: long a call takes. Linear attention, the lightest of the operators, is predicted to take 7 us for 6.3 million
#: elements (bfloat16, H200), so 50 us for 45 million. The others take longer for as many; which backend is faster there
#: has not been measured.
SMALL_CALL = 2**25


def order(*, is_small: bool = False) -> tuple[Backend, ...]:
    """CUDA first for what :func:`is_small_call` calls small."""
    return _CUDA_FIRST if is_small else ORDER


def is_small_call(activations: Iterable[torch.Tensor]) -> bool:
    """Whether a call on a GPU has fewer than ``SMALL_CALL`` elements.

    False where the sizes are symbols that do not tell: a graph that serves every size gets no guard for this.
    """
    elements = 0
    for t in activations:
        if t.is_cpu:  # where the order is one for all sizes, and calls are short
            return False
        elements += t.numel()
    if not torch.compiler.is_compiling() and type(elements) is int:
        return elements < SMALL_CALL
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return statically_known_true(elements < SMALL_CALL)


__all__ = ["ORDER", "SMALL_CALL", "Backend", "is_small_call", "order"]
