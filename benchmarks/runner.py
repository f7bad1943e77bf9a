"""The engine: takes a case and its candidates, lets through who computes the right thing, times them in turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch._inductor.async_compile import shutdown_compile_workers

from benchmarks.floor import Rates, Work

Call = Callable[[], Any]
Tick = Callable[[str, int], None]  # progress: what is being done, and how many steps it was

#: Pools of threads spin for a while after a call and slow whoever comes next.
SETTLE_SECONDS = 0.02
#: A sample repeats a short call until it takes this long, and is the median of these calls.
SAMPLE_SECONDS = 1e-3
#: Candidates that are listed for context only get fewer rounds if one call takes longer than this.
SLOW_SECONDS = 0.1
SLOW_ROUNDS = 3
#: Progress steps that building one candidate is worth.
BUILD_STEPS = 5


class Role(StrEnum):
    OURS = "ours"
    PEER = "peer"
    CONTEXT = "context"  # listed, never the best peer
    CHECK = "check"  # a peer a second time: its ratio to the first tells how far to trust the others


@dataclass(frozen=True)
class Accuracy:
    """Relative error against float64, and what it may be."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN fails


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case. ``build`` may raise: its message is printed in place of a time."""

    name: str
    variant: str
    role: Role
    build: Callable[[Any], Call]
    check: Callable[[Any, Any], Accuracy]


@dataclass(frozen=True)
class Case:
    """``prepare`` makes the data that every candidate is built and checked with."""

    name: str
    dtype: torch.dtype
    sizes: dict[str, int]
    work: Work
    candidates: tuple[Candidate, ...]
    prepare: Callable[[], Any]
    training: bool = False


@dataclass
class Row:
    """A candidate in a case: a time, or the reason why there is none."""

    suite: str
    case: str
    dtype: str
    sizes: dict[str, int]
    candidate: str
    variant: str
    role: str
    milliseconds: float | None = None
    samples: list[float] = field(default_factory=list)
    repeats: int | None = None
    error: float | None = None
    allowed_error: float | None = None
    reason: str | None = None
    bytes: int | None = None
    flops: int | None = None
    floor_milliseconds: float | None = None
    floor_is: str | None = None
    peak_bytes: int | None = None


def new_row(suite: str, case: Case, candidate: Candidate) -> Row:
    return Row(
        suite=suite,
        case=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        sizes=case.sizes,
        candidate=candidate.name,
        variant=candidate.variant,
        role=candidate.role.value,
        bytes=case.work.bytes,
        flops=case.work.flops,
    )


def explain(error: Exception) -> str:
    """One line: tracebacks of compilers run over pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def steps(case: Case, rounds: int) -> int:
    return len(case.candidates) * (BUILD_STEPS + rounds)


@dataclass
class _Runner:
    row: Row
    call: Call
    rounds: int
    repeats: int

    def sample(self) -> float:
        time.sleep(SETTLE_SECONDS)
        self.call()
        # The median within a sample, or one stall would count for each of the calls that share it.
        return statistics.median(_timed(self.call) for _ in range(self.repeats))


def measure(suite: str, case: Case, rounds: int, tick: Tick) -> list[Row]:
    """Times the candidates of a case, round-robin; one row for each, whatever happens to it."""
    rows: list[Row] = []
    runners: list[_Runner] = []
    with torch.set_grad_enabled(case.training):
        data = case.prepare()
        for candidate in case.candidates:
            tick(f"{case.name}: {candidate.name}", 0)
            row = new_row(suite, case, candidate)
            rows.append(row)
            runner = _admit(row, candidate, data, rounds)
            if runner is not None:
                runners.append(runner)
            tick(f"{case.name}: {candidate.name}", BUILD_STEPS if runner is not None else BUILD_STEPS + rounds)
        shutdown_compile_workers()  # idle ones would share the cores with what is measured
        gc.collect()
        gc.disable()  # its pauses would fall on whoever is running
        try:
            for round_ in range(rounds):
                for runner in runners:
                    if round_ < runner.rounds and runner.row.reason is None:
                        try:
                            runner.row.samples.append(runner.sample() * 1e3)
                        except Exception as error:
                            runner.row.reason = explain(error)
                tick(f"{case.name}: round {round_ + 1}", len(runners))
        finally:
            gc.enable()
    for row in rows:
        if row.reason is None:
            row.milliseconds = statistics.median(row.samples)
    del runners, data
    torch._dynamo.reset()  # or the next case counts as recompilation of this one
    gc.collect()
    return rows


def _admit(row: Row, candidate: Candidate, data: Any, rounds: int) -> _Runner | None:
    """Builds a candidate and puts it through the gate; writes down why if it does not get through."""
    try:
        call = candidate.build(data)
        accuracy = candidate.check(data, call())
        row.error, row.allowed_error = accuracy.error, accuracy.allowed
        if not accuracy.passed:
            row.reason = f"wrong: relative error {accuracy.error:.1e}, allowed {accuracy.allowed:.1e}"
            return None
        one_call = _shortest(call)
    except Exception as error:
        row.reason = explain(error)
        return None
    row.repeats = max(1, math.ceil(SAMPLE_SECONDS / one_call))
    if candidate.role is Role.CONTEXT and one_call > SLOW_SECONDS:
        rounds = min(rounds, SLOW_ROUNDS)
    return _Runner(row, call, rounds, row.repeats)


def _timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _shortest(call: Call) -> float:
    """The shortest of up to twenty calls, or of those that fit into a moment; a slow one is called once."""
    best, spent, calls = math.inf, 0.0, 0
    while calls < 20 and spent < SLOW_SECONDS:
        seconds = _timed(call)
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return best


def write_floors(rows: list[Row], cases: list[Case], rates: Rates) -> None:
    """The floor of each row, once the best rates of the run are known."""
    work = {(case.name, str(case.dtype).removeprefix("torch.")): case.work for case in cases}
    for row in rows:
        if (row.case, row.dtype) in work:
            if work[row.case, row.dtype] == Work(bytes=0, flops=0):  # most of the case is none of ours
                continue
            seconds, row.floor_is = rates.floor(work[row.case, row.dtype])
            row.floor_milliseconds = seconds * 1e3
