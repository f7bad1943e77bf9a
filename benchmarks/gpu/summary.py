"""A run in words and tables, made from its lines whenever a stage is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.gpu.lines import Line, Status, latest

#: What is listed one by one.
_LISTED = (Status.WRONG, Status.CRASHED, Status.TIMEOUT, Status.ERROR)


def of(lines: Iterable[Line], stages: Sequence[str], seconds: float) -> str:
    """Markdown: what was run, what failed, the times of the main cases, and what was not run."""
    found = latest(lines)
    if not found:
        return "Nothing was run.\n"
    last = found[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
    head = f"{last['card']}, driver {last['driver']}; {versions}; commit {last['commit'][:7]}; {seconds:.0f} s so far."
    parts = ["# GPU run", head, _counts(found, stages)]
    failed = [line for line in found if line["status"] in _LISTED]
    if failed:
        parts += ["## Failed", "\n".join(f"- {_said(line)}" for line in failed)]
    parts += _times(found)
    left = [line for line in found if line["status"] == Status.NOT_RUN]
    if left:
        parts += ["## Not run", "\n".join(f"- {_said(line)}" for line in left)]
    skipped = [line for line in found if line["status"] == Status.SKIPPED and line["stage"] != "tests"]
    if skipped:
        parts += ["## Skipped", "\n".join(f"- {_said(line)}" for line in skipped)]
    return "\n\n".join(parts) + "\n"


def _said(line: Line) -> str:
    reason = f": {line['reason']}" if line.get("reason") else ""
    return f"{line['stage']}, {line['name']}: {line['status']}{reason}"


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
