"""What a run knows of the cases without torch, which only the processes that it starts import."""

from __future__ import annotations

from typing import NamedTuple

BACKENDS = ("cuda", "triton")
DTYPES = ("bfloat16", "float16", "float32")
DIRECTIONS = ("forward", "backward")

#: The operator behind each suite; training ones have "-training" behind their name. Whole models have none.
OPERATORS = {
    "gpu-attention": "relu_linear_attention",
    "gpu-multi-scale": "multi_scale_linear_attention",
    "gpu-cascade": "cascaded_group_attention",
    "gpu-biased": "biased_attention",
}
#: What the smoke stage tries; " with ..." is a form of the operator before it. The main cases' operators first.
SMOKE = (
    "relu_linear_attention",
    "multi_scale_linear_attention",
    "cascaded_group_attention",
    "biased_attention",
    "biased_attention with talking heads",
    "multi_scale_aggregation",
)
#: The seven main cases, measured before all others.
MAIN = (
    "gpu-attention: b1 stage 3 @1024x2048, bfloat16",
    "gpu-attention: Sana N4096 C1152 H36, batch 16, float16",
    "gpu-attention-training: Sana N4096 C1152 H36, batch 16, float16",
    "gpu-multi-scale: b1 stage 3 @1024x2048, bfloat16",
    "gpu-multi-scale: l2 SAM stage 4 @1024, bfloat16",
    "gpu-cascade: m4 stage 1, batch 1, bfloat16",
    "gpu-cascade: m4 stage 1, batch 256, bfloat16",
)
#: Those whose kernels a profiler looks at.
PROFILED = (MAIN[0], MAIN[1], MAIN[3], MAIN[6])
#: The tests of each operator, where a file is about one.
TESTS = {
    "test_relu_linear_attention.py": "relu_linear_attention",
    "test_multi_scale.py": "multi_scale_linear_attention",
    "test_cascaded_group_attention.py": "cascaded_group_attention",
    "test_biased_attention.py": "biased_attention",
}


#: Of a rehearsal.
REHEARSED_MAIN = ("gpu-attention: tiny, bfloat16", "gpu-attention: crash, bfloat16")


class Kernel(NamedTuple):
    """What the smoke stage tries at once, and what is quarantined."""

    operator: str
    backend: str
    dtype: str
    direction: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend}, {self.dtype}, {self.direction}"


def kernel_of(case: str, backend: str) -> Kernel | None:
    """The kernel that a case takes of a backend, None of a whole model."""
    suite, _, rest = case.partition(": ")
    operator = OPERATORS.get(suite.removesuffix("-training"))
    direction = "backward" if suite.endswith("-training") else "forward"
    return None if operator is None else Kernel(operator, backend, rest.rpartition(", ")[2], direction)


#: Behind the name of a kernel whose launches are not waited for one by one: those that depend on the one before
#: (programmatic dependent launch) overlap with it.
OVERLAPPED = ", overlapped"
#: A file that processes of a stage take turns by (benchmarks/gpu/turns.py); without one, nothing runs beside a process.
CARD_LOCK = "EFFATTN_CARD_LOCK"
#: Behind the name of a kernel that is tried a second time, beside fewer others.
AGAIN = ", again"
