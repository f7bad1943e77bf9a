"""Which skips are right where all tools are installed: what a machine's hardware or the kind of run rules out.

With ``--strict-tools``, which CI=true implies, any other skip is a failure: a missing nvcc, triton, qemu or onnxruntime
would leave whole folders untested, and green.
"""

from __future__ import annotations

import re

import pytest

ALLOWED = re.compile(
    "|".join(
        [
            "needs (a GPU|two GPUs)",
            "there is a GPU",
            "torch sees no CUDA device",
            "this torch is built without CUDA",
            "this processor has no ",
            r"needs \d+ GiB",
            "EFFATTN_TEST_LARGE=1",
            "is a peer that make bench installs",
            "is a release of onnxruntime that EFFATTN_TEST_ONNXRUNTIME_LIBRARY names",
            "the interpreter compiles nothing",
            "is of (triton|cuda) alone, where (triton|cuda)( and cuda)? runs",
            "without clusters, sums over tokens are added up",
            "runs on the emulated kernels, in make test-cuda",
        ]
    )
)


def judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a failure of a skip whose reason is none of these."""
    if not (report.skipped and isinstance(report.longrepr, tuple)):
        return
    path, line, reason = report.longrepr
    if not all(map(ALLOWED.search, reason.splitlines())):  # of several reasons, a line each
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: {reason}: with --strict-tools, what is missing is a failure"
