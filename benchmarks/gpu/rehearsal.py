"""Stand-ins for a run without a GPU: tiny cases, and kernels that fail in every way that a GPU knows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import cases, faults
from benchmarks.gpu.runner import GpuCase

#: Set in the processes of a rehearsal.
VARIABLE = "EFFATTN_REHEARSAL"
#: Whose cases are right, or crash; and whose are wrong.
_RIGHT, *_, _WRONG = (measured for measured in cases.MEASURED if measured.shapes)


def is_on() -> bool:
    """Whether this process rehearses."""
    return os.environ.get(VARIABLE) == "1"


def _wrong(case: GpuCase) -> Callable[..., torch.Tensor]:
    return lambda *arguments: 2 * case.ours(*arguments)


def faulty(case: GpuCase, fault: str) -> GpuCase:
    """The case with a kernel that fails in that way; everybody else computes what they did."""
    return dataclasses.replace(case, name=fault, ours=faults.FAULTS.get(fault) or _wrong(case))


def smoke(kernel: str, dtype: torch.dtype, training: bool) -> list[GpuCase]:
    """A tiny case of a kernel that works, or fails in one of the ways."""
    case = _RIGHT.case(_RIGHT.tiny[0], training, dtype)
    return [faulty(case, kernel) if kernel in faults.NAMES else case]


def tiny() -> GpuCase:
    """A case that is right."""
    return _RIGHT.case(_RIGHT.tiny[0], False)


def _right_and_crash() -> list[GpuCase]:
    return [tiny(), faulty(tiny(), "crash")]


def _training() -> list[GpuCase]:
    return [faulty(_WRONG.case(_WRONG.tiny[0], True), "wrong")]


SUITES: dict[str, tuple[str, Callable[[], list[GpuCase]]]] = {
    _RIGHT.suite: (f"{_RIGHT.title}, rehearsed", _right_and_crash),
    f"{_WRONG.suite}-training": (f"{_WRONG.title}, rehearsed", _training),
}
OPERATOR_OF = {_RIGHT.suite: _RIGHT.operator.name, f"{_WRONG.suite}-training": _WRONG.operator.name}
SMOKE = {_RIGHT.operator.name: _RIGHT}
MAIN = [cases.name_of(case) for case in _right_and_crash()]
PROFILED: list[str] = []


def compiled(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    """In place of torch.compile: as far as recording the graphs, which takes no compiler."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
