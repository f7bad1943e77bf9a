"""What a run knows of kernels without torch, which only the processes that it starts import: one of them tells of the
cases (:mod:`benchmarks.gpu.backends`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

BACKENDS = ("cuda", "triton")
DTYPES = ("bfloat16", "float16", "float32")
DIRECTIONS = ("forward", "backward")


class Kernel(NamedTuple):
    """What the smoke stage tries at once, and what is quarantined; " with ..." is a form of the operator before it."""

    operator: str
    backend: str
    dtype: str
    direction: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend}, {self.dtype}, {self.direction}"


def operator_of(kernel: Kernel) -> str:
    """Without its form."""
    return kernel.operator.split(" with ")[0]


def kernel_of(case: str, backend: str, operators: Mapping[str, str]) -> Kernel | None:
    """The kernel that a case takes of a backend, None of a whole model; ``operators`` are those of the suites."""
    suite, _, rest = case.partition(": ")
    direction = "backward" if suite.endswith("-training") else "forward"
    operator = operators.get(suite)
    return None if operator is None else Kernel(operator, backend, rest.rpartition(", ")[2], direction)


#: Behind the name of a kernel whose launches are not waited for one by one: those that depend on the one before
#: (programmatic dependent launch) overlap with it.
OVERLAPPED = ", overlapped"
#: A file that processes of a stage take turns by (benchmarks/gpu/turns.py); without one, nothing runs beside a process.
GPU_LOCK = "EFFATTN_GPU_LOCK"
#: Behind the name of a kernel that is tried a second time, beside fewer others.
AGAIN = ", again"
