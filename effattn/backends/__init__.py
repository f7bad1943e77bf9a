"""The backends, in the order in which the registry asks them.

A backend says what it supports and how it is launched. ``functions`` maps an operator's name to its
launch: for a fused backend the operators of :class:`Fused` (or the operator itself, of a function that is for
inference alone), for the reference a plain function.
"""

from __future__ import annotations

from effattn.backends import cpu, reference, triton
from effattn.backends._base import Backend, Fused

ORDER: tuple[Backend, ...] = (cpu.BACKEND, triton.BACKEND, reference.BACKEND)

__all__ = ["ORDER", "Backend", "Fused"]
