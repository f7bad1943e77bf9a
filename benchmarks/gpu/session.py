"""A run on a card within a time: suites one after the other, results kept as they come."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, results
from benchmarks.floor import Rates
from benchmarks.gpu import runner
from benchmarks.gpu.cases import SUITES
from benchmarks.gpu.clock import Clock, CudaClock
from benchmarks.runner import write_floors
from benchmarks.suites import Settings


def run(
    names: Sequence[str] | None,
    seconds: float,
    rounds: int,
    only: tuple[str, ...],
    compiled: bool,
    output: Path,
    say: Callable[[str], Any],
    clock: Clock | None = None,
) -> Path:
    """Measures and returns the file of the results.

    Raises:
        ValueError: for a suite that there is not.
        RuntimeError: if there is no card.
    """
    unknown = set(names or ()) - set(SUITES)
    if unknown:
        raise ValueError(f"suite: expected some of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    if clock is None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU: there is nothing to measure")
        clock = CudaClock()
    begin, settings = time.monotonic(), Settings(rounds, short=not compiled, only=only)
    facts = environment.facts() | card(clock)
    path = output / results.file_name(facts, settings)
    data, rates = results.read_or_new(path), Rates()
    for name, (title, make) in SUITES.items():
        if names is not None and name not in names:
            continue
        rows, measured, left_out = [], [], []
        for case in make():
            if not settings.keeps(case.name):
                continue
            if time.monotonic() - begin > seconds:
                left_out.append(case.name)
                continue
            say(f"{time.monotonic() - begin:5.0f} s  {name}: {case.name}")
            clock.rates(rates)
            rows += runner.measure(case, clock, rounds, compiled)
            measured.append(case)
        if left_out:
            say(f"no time was left for {name}: {'; '.join(left_out)}")
        if not rows:
            continue
        write_floors(rows, measured, rates)
        if left_out:
            title += f" (no time was left for: {'; '.join(left_out)})"
        taken = facts | {"date": environment.now()}
        results.add(data, name, title, settings, taken, rates, rows)
        results.write(path, data)
    if not data["suites"]:
        raise ValueError("only: expected part of the name of a case of these suites")
    return path


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
