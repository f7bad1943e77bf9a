"""Fresh processes: for peak memory, and for an allocator other than this process's own.

A job names a suite, a case and candidates; the child looks them up, does the work, and prints its rows as
one line of JSON, the last of its output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from benchmarks import environment
from benchmarks.runner import Case, Row

LONGEST_SECONDS = 600


@dataclass(frozen=True)
class Job:
    """``kind`` is one of ``KINDS``; ``candidates`` are names, and ``variant`` picks one of each."""

    kind: str
    suite: str
    case: str
    candidates: tuple[str, ...]
    variant: str
    rounds: int = 1


def run(job: Job, allocator: dict[str, str]) -> list[Row]:
    """The rows of a job done in a fresh process with these allocator settings.

    Raises:
        RuntimeError: with the last line of the child's complaint, if it does not answer.
    """
    command = [sys.executable, "-m", "benchmarks", "child", json.dumps(asdict(job))]
    done = subprocess.run(
        command,
        env=environment.with_allocator(allocator),
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
    )
    if done.returncode != 0:
        complaint = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(complaint[-1])
    return [Row(**row) for row in json.loads(done.stdout.strip().splitlines()[-1])]


def answer(text: str) -> str:
    """What the child prints for a job."""
    job = Job(**json.loads(text))
    return json.dumps([asdict(row) for row in KINDS[job.kind](job, _find(job))])


def _find(job: Job) -> Case:
    from benchmarks.suites import SUITES, TimedSuite

    suite = SUITES[job.suite]
    if not isinstance(suite, TimedSuite):
        raise ValueError(f"{job.suite} has no cases of its own")
    case = next(case for case in suite.cases(False) if case.name == job.case)
    candidates = tuple(c for c in case.candidates if c.name in job.candidates and c.variant == job.variant)
    return replace(case, candidates=candidates)


def _time(job: Job, case: Case) -> list[Row]:
    from benchmarks import runner

    return runner.measure(job.suite, case, job.rounds, lambda doing, steps: None)


def _peak_memory(job: Job, case: Case) -> list[Row]:
    from benchmarks import memory

    return [memory.row(job.suite, case, candidate) for candidate in case.candidates]


KINDS: dict[str, Callable[[Job, Case], list[Row]]] = {"time": _time, "peak memory": _peak_memory}
