"""One case in this process: ``python -m benchmarks.gpu.case PART CASE``.

PART is ``plain`` (ours on each backend of EFFATTN_MEASURED_BACKENDS, and peers as they are), ``compiled`` (peers under
torch.compile, quick modes), ``compiled-all`` (all modes) or ``profile`` (two calls of ours, the second between
cudaProfilerStart and Stop).
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch

from benchmarks import peers
from benchmarks.floor import Rates
from benchmarks.gpu import cases, child, rehearsal, runner, turns
from benchmarks.gpu.clock import CudaClock, WallClock
from benchmarks.gpu.lines import Status
from benchmarks.gpu.runner import GpuCase, Way
from benchmarks.runner import Row, explain

BACKENDS_VARIABLE = "EFFATTN_MEASURED_BACKENDS"
ROUNDS_VARIABLE = "EFFATTN_ROUNDS"


def source() -> ModuleType:
    """Where the cases of this run stand."""
    return rehearsal if rehearsal.is_on() else cases


def all_cases() -> list[GpuCase]:
    """Of all suites in turn: the first of each, then the second. Whole models are one case a turn too."""
    lists = [make() for _, make in source().SUITES.values()]
    most = max(len(of_suite) for of_suite in lists)
    return [of_suite[i] for i in range(most) for of_suite in lists if i < len(of_suite)]


def find(name: str) -> GpuCase:
    """Raises ValueError if no case is called like that."""
    for case in all_cases():
        if cases.name_of(case) == name:
            return case
    raise ValueError(f"case: expected one of {', '.join(map(cases.name_of, all_cases()))}, got {name!r}")


def ways_of(part: str, case: GpuCase) -> list[Way]:
    if part == "plain":
        return runner.plain_ways(case, os.environ.get(BACKENDS_VARIABLE, "").split())
    modes = {"compiled": runner.QUICK_MODES, "compiled-all": runner.ALL_MODES}
    if part not in modes:
        raise ValueError(f"part: expected plain, compiled, compiled-all or profile, got {part!r}")
    return runner.compiled_ways(case, modes[part])


def name_of(case: GpuCase, candidate: str, variant: str) -> str:
    """Of a line."""
    return f"{cases.name_of(case)}: {candidate}, {variant}"


class Telling:
    """Tells the parent of every row; ends the process at an error after which no kernel runs."""

    def __init__(self, case: GpuCase) -> None:
        self._case = case

    def begin(self, row: Row) -> None:
        child.begin(name_of(self._case, row.candidate, row.variant), row={**asdict(row), "milliseconds": None})

    def finish(self, row: Row, error: Exception | None, provisional: bool = False) -> None:
        wrong = row.reason is not None and row.reason.startswith("wrong")
        status = Status.OK if row.reason is None else Status.WRONG if wrong else Status.ERROR
        figures: dict[str, Any] = {} if row.reason is None else {"reason": row.reason}
        if provisional:
            figures["provisional"] = True
        child.finish(name_of(self._case, row.candidate, row.variant), status, **figures, row=asdict(row))
        if error is not None and child.is_sticky(error):
            sys.stdout.flush()
            os._exit(child.STICKY)  # what is on the GPU is beyond being freed


def profile(case: GpuCase, clock: WallClock) -> None:
    arguments = runner.on(clock.device, case.make())
    backend = os.environ[BACKENDS_VARIABLE].split()[0]
    (function,) = runner.ours(case, [backend]).values()
    with torch.no_grad():
        function(*arguments)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        function(*arguments)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main() -> None:
    part, name = sys.argv[1:]
    done = child.start()
    case = find(name)
    clock: WallClock = WallClock() if rehearsal.is_on() else CudaClock()
    if rehearsal.is_on():
        peers.compiled = rehearsal.compiled
    if part == "profile":
        profile(case, clock)
        return
    ways = [way for way in ways_of(part, case) if name_of(case, way.candidate, way.variant) not in done]
    rates = f"{name}: rates of the GPU"
    child.plan(
        [*([] if part != "plain" or rates in done else [rates]), *(name_of(case, w.candidate, w.variant) for w in ways)]
    )
    if part == "plain" and rates not in done:
        child.begin(rates)
        found = Rates()
        try:
            with turns.alone():
                clock.rates(found)
            child.finish(rates, Status.OK, rates=found.as_json())
        except Exception as error:
            child.finish(rates, Status.ERROR, reason=explain(error))
    runner.measure(case, ways, clock, int(os.environ.get(ROUNDS_VARIABLE, "9")), Telling(case))


if __name__ == "__main__":
    main()
