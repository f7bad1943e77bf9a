"""A run in words and tables, made from its lines while it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.gpu.lines import FAILED, Line, Status, latest

#: Of a list, as much is shown; the lines have the rest.
_MOST = 40


def of(lines: Iterable[Line], stages: Sequence[str], seconds: float) -> str:
    """Markdown: what was run, what failed, everybody's times, and what was not run."""
    found = latest(lines)
    if not found:
        return "Nothing was run.\n"
    not_captured = [{**line, "reason": line["not_captured"]} for line in found if "not_captured" in line]
    skipped = [line for line in found if line["status"] == Status.SKIPPED and line["stage"] != "tests"]
    parts = [
        brief(found, stages, seconds),
        *_times(found),
        *_list("Right, but no graph could be captured", not_captured),
        *_list("Not run", [line for line in found if line["status"] == Status.NOT_RUN]),
        *_list("Skipped", skipped),
    ]
    return "\n\n".join(parts) + "\n"


def brief(lines: Iterable[Line], stages: Sequence[str], seconds: float) -> str:
    """What was run, and what failed."""
    found = latest(lines)
    last = found[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
    head = f"{last['gpu']}, driver {last['driver']}; {versions}; commit {last['commit'][:7]}; {seconds:.0f} s so far."
    failed = [line for line in found if line["status"] in FAILED]
    return "\n\n".join(["# GPU run", head, _counts(found, stages), *_list("Failed", failed)])


def _list(title: str, lines: Sequence[Line]) -> list[str]:
    """Nothing of no lines."""
    shown = [f"- {_said(line)}" for line in lines[:_MOST]]
    if len(lines) > _MOST:
        shown.append(f"- and {len(lines) - _MOST} more")
    return [f"## {title}", "\n".join(shown)] if lines else []


def _said(line: Line) -> str:
    reason = (line.get("reason") or "").removeprefix(f"{line['status']}: ")
    return f"{line['stage']}, {line['name']}: {line['status']}{': ' if reason else ''}{reason}"


def _counts(found: Sequence[Line], stages: Sequence[str]) -> str:
    body = []
    for stage in stages:
        statuses = Counter(line["status"] for line in found if line["stage"] == stage)
        body.append([stage, *(statuses.get(str(status), "") for status in Status)] if statuses else [stage])
    return tabulate(body, ["stage", *map(str, Status)], tablefmt="github")


def _times(found: Sequence[Line]) -> list[str]:
    """A table a case, with everybody's time in microseconds."""
    by_case: dict[str, list[Any]] = {}
    for line in found:
        row = line.get("row")
        if row is not None:
            case = f"{row['suite']}: {row['case']}, {row['dtype']}"
            by_case.setdefault(case, []).append(
                [
                    row["candidate"],
                    row["variant"],
                    "-" if row["milliseconds"] is None else f"{row['milliseconds'] * 1e3:.1f}",
                    len(row["samples"]),
                    "" if row["error"] is None else f"{row['error']:.1e}",
                    line.get("reason") or "",
                ]
            )
    head = ["", "", "us", "samples", "error", ""]
    tables = [f"### {case}\n\n{tabulate(body, head, tablefmt='github')}" for case, body in by_case.items()]
    return ["## Times", *tables] if tables else []
