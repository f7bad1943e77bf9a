"""One kernel against float64, in this process: ``python -m benchmarks.gpu.smoke OPERATOR BACKEND DTYPE DIRECTION``.

Then its calls are captured on a GPU, and a graph's replay must give the same bits. Whatever follows is put behind the
kernel's name in what is told of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu import child, rehearsal, runner
from benchmarks.gpu.case import source
from benchmarks.gpu.clock import Call, CudaClock, WallClock
from benchmarks.gpu.lines import Status
from benchmarks.gpu.names import Kernel
from benchmarks.gpu.runner import GpuCase
from benchmarks.runner import GATE, Role, explain
from effattn import _library
from effattn.backends.triton import is_interpreted


def device_of(backend: str) -> torch.device:
    """Where a backend for GPUs runs: on the host if it is emulated or interpreted."""
    on_host = is_interpreted() if backend == "triton" else _library.cuda_is_emulated
    return torch.device("cpu" if on_host else "cuda")


def check(kernel: Kernel, most: int | None = None) -> dict[str, Any]:
    """Status, error and allowed error of the worst of the kernel's cases, or of the first ones.

    Raises:
        ValueError: for a kernel that there is not.
    """
    device, training = device_of(kernel.backend), kernel.direction == "backward"
    dtype = getattr(torch, kernel.dtype)
    found: dict[str, Any] = {"status": str(Status.OK), "error": 0.0, "allowed_error": GATE[dtype]}
    calls = []
    for case in source().smoke(kernel.operator, dtype, training)[:most]:
        arguments = case.make()
        with torch.set_grad_enabled(training):
            grad_out, truth = runner.expected(case, arguments)
            (function,) = runner.ours(case, [kernel.backend]).values()
            there = None if grad_out is None else grad_out.to(device)
            call = runner.step(function, runner.on(device, arguments), there)
            results = call()
        calls.append((case, call, results))
        accuracy = runner.accuracy(case, Role.OURS, [t.cpu() for t in results], truth)
        if not accuracy.error <= found["error"]:
            found["error"], found["allowed_error"] = accuracy.error, accuracy.allowed
        if not accuracy.passed:
            reason = f"{case.name}, {case.sizes}: relative error {accuracy.error:.1e}, allowed {accuracy.allowed:.1e}"
            return {**found, "status": str(Status.WRONG), "reason": reason}
    if device.type != "cuda" and not rehearsal.is_on():
        return found
    with torch.set_grad_enabled(training):
        # After all of them: a capture that fails may leave more behind than a call.
        return found | _replays(CudaClock() if device.type == "cuda" else WallClock(), calls)


def _replays(clock: WallClock, calls: Sequence[tuple[GpuCase, Call, Sequence[torch.Tensor]]]) -> dict[str, Any]:
    """What there is to say of graphs of these calls, beside what the calls gave; nothing if they are right."""
    for case, call, results in calls:
        try:
            is_same = runner.same_bits(results, clock.replayed(call))
        except RuntimeError as error:
            if child.says_sticky(error):  # the GPU is not asked: a capture that broke off may answer for it
                raise
            return {"not_captured": explain(error)}
        if not is_same:
            return {"status": str(Status.WRONG), "reason": f"{case.name}, {case.sizes}: {runner.OTHER_BITS}"}
    return {}


def main() -> None:
    kernel = Kernel(*sys.argv[1:5])
    name = str(kernel) + "".join(sys.argv[5:])
    child.start()
    child.begin(name)
    try:
        found = check(kernel)
    except Exception as error:
        found = {"status": str(Status.ERROR), "reason": explain(error)}
    child.finish(name, found.pop("status"), **found)


if __name__ == "__main__":
    main()
