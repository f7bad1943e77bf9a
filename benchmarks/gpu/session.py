"""A run on a card within a time: suites one after the other, results kept as they come."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, report, results
from benchmarks.floor import Rates
from benchmarks.gpu import runner
from benchmarks.gpu.cases import SUITES
from benchmarks.gpu.clock import Clock, CudaClock
from benchmarks.gpu.runner import GpuCase
from benchmarks.runner import Row, write_floors
from benchmarks.suites import Settings


def run(
    names: Sequence[str] | None,
    seconds: float,
    rounds: int,
    only: tuple[str, ...],
    compiled: int | None,
    output: Path,
    say: Callable[[str], Any],
    clock: Clock | None = None,
) -> Path:
    """Measures and returns the file of the results, which is written, with its tables, after every case.

    Cases are taken from all suites in turn, so that every suite has some when time is over. ``compiled`` is in how many
    cases of a suite torch.compile takes part, None for all: it takes most of the time, and these cases come last.

    Raises:
        ValueError: for a suite that there is not, or if no case is called like that.
        RuntimeError: if there is no card.
    """
    unknown = set(names or ()) - set(SUITES)
    if unknown:
        raise ValueError(f"suite: expected some of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    if clock is None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU: there is nothing to measure")
        clock = CudaClock()
    begin, settings = time.monotonic(), Settings(rounds, short=compiled is not None, only=only)

    def spent() -> float:
        return time.monotonic() - begin

    facts = environment.facts() | card(clock)
    path = output / results.file_name(facts, settings)
    data, rates = results.read_or_new(path), Rates()
    chosen = {name: suite for name, suite in SUITES.items() if names is None or name in names}
    parts = {name: _Part() for name in chosen}
    for name, case, takes_part in _in_turn({name: make() for name, (_, make) in chosen.items()}, compiled, settings):
        part, title = parts[name], chosen[name][0]
        if spent() > seconds:
            part.left_out.append(case.name)
            say(f"no time was left for {name}: {case.name}")
        else:
            say(f"{spent():5.0f} s  {name}: {case.name}")
            clock.rates(rates)
            part.rows += runner.measure(case, clock, rounds, takes_part, lambda: spent() > seconds)
            part.cases.append(case)
        if part.cases:
            write_floors(part.rows, part.cases, rates)
            if part.left_out:
                title += f" (no time was left for: {'; '.join(part.left_out)})"
            results.add(data, name, title, settings, facts | {"date": environment.now()}, rates, part.rows)
            results.write(path, data)
            path.with_suffix(".md").write_text(report.table(data) + "\n")
    if not any(part.cases for part in parts.values()):
        raise ValueError("only: expected part of the name of a case of these suites, and time to measure it")
    return path


def _in_turn(
    suites: dict[str, list[GpuCase]], compiled: int | None, settings: Settings
) -> list[tuple[str, GpuCase, bool]]:
    """The first case of each suite, then the second, and whether torch.compile takes part; last those in which it does,
    unless it does in all."""
    order = [
        (compiled is None or index < compiled, index, name, case)
        for name, cases in suites.items()
        for index, case in enumerate(case for case in cases if settings.keeps(case.name))
    ]
    return [(name, case, takes_part) for takes_part, _, name, case in sorted(order, key=lambda entry: entry[:2])]


@dataclass
class _Part:
    """Of a suite, what has been measured."""

    cases: list[Any] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def card(clock: Clock) -> dict[str, str]:
    """What is measured."""
    if clock.device.type != "cuda":
        return {"gpu": "rehearsal", "driver": "none"}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"gpu": torch.cuda.get_device_name(clock.device), "driver": driver}
