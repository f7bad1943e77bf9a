"""Stand-ins for a run without a card: tiny cases, and kernels that fail in every way that a card knows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import cases, faults
from benchmarks.gpu.runner import GpuCase
from effattn.testing import AttentionCase, BiasedCase

#: Set in the processes of a rehearsal.
VARIABLE = "EFFATTN_REHEARSAL"


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
    case = cases._attention(AttentionCase("tiny", 1, 2, 8, 3, 3), dtype, training)
    return [faulty(case, kernel) if kernel in faults.NAMES else case]


def attention() -> list[GpuCase]:
    case = cases._attention(AttentionCase("tiny", 1, 2, 8, 3, 3), torch.bfloat16, False)
    return [case, faulty(case, "crash")]


def biased(training: bool) -> list[GpuCase]:
    return [faulty(cases._biased("tiny", BiasedCase(1, 2, 5, 6, 4, 8), training), "wrong")]


SUITES: dict[str, tuple[str, Callable[[], list[GpuCase]]]] = {
    "gpu-attention": ("attention, rehearsed", attention),
    "gpu-biased-training": ("biased attention, rehearsed", partial(biased, True)),
}


def compiled(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    """In place of torch.compile: as far as recording the graphs, which takes no compiler."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
