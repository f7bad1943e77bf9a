"""The engine: takes a case and its candidates, lets through who computes the right thing, times them in turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch._inductor.async_compile import shutdown_compile_workers

from benchmarks.floor import Rates, Work

Call = Callable[[], Any]
Tick = Callable[[str, int], None]  # progress: what is being done, and how many steps it was

#: Candidates that are listed for context only get fewer rounds if one call takes longer than this.
SLOW_SECONDS = 0.1
SLOW_ROUNDS = 3
#: A call of this length has averaged over the machine's disturbances by itself, and what its first milliseconds
#: cost is below a hundredth: it needs no warm-up, and no more than this many rounds.
LONG_SECONDS = 1.0
LONG_ROUNDS = 5
#: Progress steps that building one candidate is worth.
BUILD_STEPS = 5


@dataclass(frozen=True)
class Protocol:
    """How one sample is taken: a rest, untimed calls (the warm-up), timed calls, whose median it is.

    ``warm_up`` is the least time of the untimed calls, of which there is one at least; None leaves them out. Calls are
    timed until they should have taken ``timed`` seconds, again one at least. ``name`` stands with every row.
    """

    name: str
    rest: float
    warm_up: float | None
    timed: float

    def repeats(self, seconds: float) -> int:
        """The timed calls of a sample, of a call that takes ``seconds``."""
        return max(1, math.ceil(self.timed / seconds))

    def sample(self, call: Call, repeats: int) -> float:
        """Seconds of a call."""
        time.sleep(self.rest)
        if self.warm_up is not None:
            start = time.perf_counter()
            call()
            while time.perf_counter() - start < self.warm_up:
                call()
        # The median within a sample, or one stall would count for each of the calls that share it.
        return statistics.median(_timed(call) for _ in range(repeats))


#: What a loop over a model sees. Rest: idle thread pools spin for a while after a call and take a core from whoever
#: comes next, onnxruntime's for 35 ms. Warm-up: a thread that has slept may wake up on its caller's core and wait
#: there for scheduler ticks (of up to 10 ms), and the caller for it at the next barrier: 25 ms are too few (NOTES).
#: Timed: several calls of a short one, since single ones are a clock's resolution and an interrupt.
STEADY = Protocol("steady", rest=0.06, warm_up=0.05, timed=1e-3)
#: What the first request after a pause sees: threads asleep, caches cold, all of it counted. No pool spins that long.
RESTED = Protocol("rested", rest=0.1, warm_up=None, timed=0.0)
#: How results without a protocol's name were taken: into the spinning of onnxruntime, with an awakening half over.
FORMER = Protocol("former", rest=0.02, warm_up=0.0, timed=1e-3)


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


#: Relative error (norm) that a gate lets pass of a peer, a module or a GPU: far above rounding, far below any mistake.
GATE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


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
    """``prepare`` makes the data that every candidate is built and checked with; ``protocol`` samples them all.

    ``threads``: that torch has meanwhile, and with it everybody; None for all cores.
    """

    name: str
    dtype: torch.dtype
    sizes: dict[str, int]
    work: Work
    candidates: tuple[Candidate, ...]
    prepare: Callable[[], Any]
    training: bool = False
    protocol: Protocol = STEADY
    threads: int | None = None


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
    protocol: str | None = None


def new_row(suite: str, case: Any, candidate: str, variant: str, role: Role, protocol: str | None = None) -> Row:
    """Of a case here or on a GPU, without a time."""
    return Row(
        suite=suite,
        case=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        sizes=case.sizes,
        candidate=candidate,
        variant=variant,
        role=role.value,
        bytes=case.work.bytes,
        flops=case.work.flops,
        protocol=protocol,
    )


def explain(error: Exception) -> str:
    """One line: tracebacks of compilers run over pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def steps(case: Case, rounds: int) -> int:
    return len(case.candidates) * (BUILD_STEPS + rounds)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Runner:
    row: Row
    call: Call
    protocol: Protocol
    rounds: int
    repeats: int

    def sample(self) -> float:
        return self.protocol.sample(self.call, self.repeats)


def measure(suite: str, case: Case, rounds: int, tick: Tick) -> list[Row]:
    """Times the candidates of a case, round-robin; one row for each, whatever happens to it."""
    rows: list[Row] = []
    runners: list[_Runner] = []
    with torch.set_grad_enabled(case.training), _threads(case.threads):
        data = case.prepare()
        for candidate in case.candidates:
            tick(f"{case.name}: {candidate.name}", 0)
            row = new_row(suite, case, candidate.name, candidate.variant, candidate.role, case.protocol.name)
            rows.append(row)
            runner = _admit(row, candidate, case.protocol, data, rounds)
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


def _admit(row: Row, candidate: Candidate, protocol: Protocol, data: Any, rounds: int) -> _Runner | None:
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
    row.repeats = protocol.repeats(one_call)
    if candidate.role is Role.CONTEXT and one_call > SLOW_SECONDS:
        rounds = min(rounds, SLOW_ROUNDS)
    if one_call > LONG_SECONDS:
        rounds, protocol = min(rounds, LONG_ROUNDS), replace(protocol, warm_up=None)
    return _Runner(row, call, protocol, rounds, row.repeats)


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
