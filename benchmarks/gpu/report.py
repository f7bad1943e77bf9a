"""What a run's lines say of speed: a results file, its tables, and the README's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import environment, report, results
from benchmarks.floor import Rates, Work
from benchmarks.gpu import cases, lines, rehearsal
from benchmarks.gpu.lines import Line
from benchmarks.report import CaseResult
from benchmarks.results import Results
from benchmarks.runner import Row
from benchmarks.suites import Settings

README_BEGIN, README_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
NO_FIGURES = "No GPU has been measured yet: no figures."


def write(source: Path, folder: Path, readme: Path) -> list[Path]:
    """Writes <GPU>-torch<version>-<commit>.json and .md into a folder, and the README's table; returns what it wrote.

    Raises:
        ValueError: if ``source`` has no lines of a run that measured something, or the README has no markers; of a
            rehearsal, if this is the project's README.
    """
    found = lines.latest(lines.read(source))
    data = results_of(found)
    if not data["suites"]:
        raise ValueError(f"expected lines of a run that measured something, got {source}, which did not")
    if any(line.get("rehearsal") for line in found) and readme.resolve() == (environment.ROOT / "README.md").resolve():
        raise ValueError(f"expected lines of a run on a GPU, got {source}, of a rehearsal: give another --target")
    facts = next(iter(data["suites"].values()))["environment"]
    path = folder / results.file_name(facts, Settings(0, facts["short"], tuple(facts["only"])))
    report.update_between(readme, README_BEGIN, README_END, readme_table(data))
    results.write(path, data)
    path.with_suffix(".md").write_text(f"{report.table(data)}\n\n{failures(found)}")
    return [path, path.with_suffix(".md"), readme]


def results_of(found: Sequence[Line]) -> Results:
    """As :mod:`benchmarks.results` has them: a suite for each that has rows, with the floors of the run's best rates.

    Raises:
        ValueError: if there are no lines.
    """
    if not found:
        raise ValueError("expected lines of a run on a GPU, got none")
    rates = _rates(found)
    by_suite: dict[str, list[Row]] = {}
    for line in found:
        if line.get("row") is not None:
            row = Row(**line["row"])
            if line["status"] != lines.Status.OK and row.reason is None:  # its process ended
                row.reason = f"{line['status']}: {line.get('reason')}"
            _write_floor(row, rates)
            by_suite.setdefault(row.suite, []).append(row)
    data: Results = {"schema": results.SCHEMA, "suites": {}}
    facts = _facts(found)
    for suite, rows in by_suite.items():
        title = {**rehearsal.SUITES, **cases.SUITES}[suite][0]
        left = sorted({line["name"].split(": ")[1] for line in found if _is_left_out(line, suite)})
        if left:
            title += f" (not all of: {'; '.join(left)})"
        most = max(len(row.samples) for row in rows)
        results.add(data, suite, title, Settings(most, facts["short"], tuple(facts["only"])), facts, rates, rows)
    return data


def _is_left_out(line: Line, suite: str) -> bool:
    return line["status"] == lines.Status.NOT_RUN and line["name"].startswith(f"{suite}: ")


def _rates(found: Sequence[Line]) -> Rates:
    """The best of all."""
    rates = Rates()
    for line in found:
        told = line.get("rates") or {"copy_GB_per_s": {}, "matmul_GFLOP_per_s": {}}
        for size, rate in told["copy_GB_per_s"].items():
            rates.copy[int(size)] = max(rates.copy.get(int(size), 0.0), rate * 1e9)
        for dtype, rate in told["matmul_GFLOP_per_s"].items():
            kind = getattr(torch, dtype)
            rates.matmul[kind] = max(rates.matmul.get(kind, 0.0), rate * 1e9)
    return rates


def _write_floor(row: Row, rates: Rates) -> None:
    dtype = getattr(torch, row.dtype)
    if row.bytes and rates.copy and {dtype, torch.float32} <= set(rates.matmul):
        seconds, row.floor_is = rates.floor(Work(row.bytes, row.flops or 0, dtype))
        row.floor_milliseconds = seconds * 1e3


def _facts(found: Sequence[Line]) -> dict[str, Any]:
    """What the numbers depend on, as far as a run on a GPU tells."""
    machine = next((line for line in found if "cores" in line), {})
    asked = next((line for line in found if "limit" in line), {})
    last = found[-1]
    clocks = [line["sm_clock"] for line in found if line.get("row") and line.get("sm_clock")]
    return {
        "date": machine.get("date") or environment.now(),
        "gpu": last["gpu"],
        "driver": last["driver"],
        "commit": last["commit"],
        "dirty": machine.get("dirty"),
        "versions": {**machine.get("versions", {}), **last["versions"]},
        "cpu": machine.get("cpu", ""),
        "cores": machine.get("cores", 0),
        "sm_clock_MHz": [min(clocks), max(clocks)] if clocks else None,
        # In a limited run fewer modes of torch.compile take part, even if all cases had their turn.
        "short": asked.get("limit") is not None,
        "only": asked.get("only", []),
    }


def failures(found: Sequence[Line]) -> str:
    """What failed beside the measurements, one line each; tables have the reasons of the rest."""
    said = [
        f"- {line['stage']}, {line['name']}: {line['status']}, {line.get('reason', '')}"
        for line in found
        if line["status"] in lines.FAILED and line.get("row") is None
    ]
    return "\n".join(["### Failed", "", *said, ""]) if said else ""


# --- README ---------------------------------------------------------------------------------------------


def readme_table(data: Results) -> str:
    """A line a case: ours, the best peer, the floor; slower ones say so."""
    body = [
        [label, *_cells(case)]
        for suite, label in cases.README_TITLES.items()
        for case in report.cases(data, suite)
        if case.ours is not None or case.best_peer is not None
    ]
    if not body:
        return NO_FIGURES
    head = ["", "case", "best peer, us", "effattn, us", "speed-up", "floor, us", "over floor"]
    facts = next(iter(data["suites"].values()))["environment"]
    notes = f"{report.taken_on(facts)}. A graph's time or a call's, whichever is shorter."
    return "\n".join([tabulate(body, head, tablefmt="github", disable_numparse=True), "", notes])


def _cells(case: CaseResult) -> list[str]:
    ours, peer = case.ours, case.best_peer
    speed_up = report.marked(case)
    if case.speed_up is not None and case.speed_up < 1:
        speed_up += ", slower"
    return [
        case.name,
        f"{peer.candidate} {_microseconds(peer.milliseconds)}" if peer else "-",
        f"{ours.candidate} {_microseconds(ours.milliseconds)}" if ours else "-",
        speed_up,
        _microseconds(case.floor),
        report.times(case.over_floor),
    ]


def _microseconds(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else report.milliseconds(milliseconds * 1e3)
