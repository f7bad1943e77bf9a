"""Reads results: who is best, tables for the terminal and the README."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tabulate import tabulate

from benchmarks import results
from benchmarks.results import Results
from benchmarks.runner import Role, Row

#: The stock row and its repetition may differ by this before the case's ratios are marked as doubtful.
CHECK_TOLERANCE = 0.10
CHECK_SUFFIX = " (again)"
README_BEGIN, README_END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


@dataclass(frozen=True)
class CaseResult:
    """All rows of one case."""

    name: str
    rows: tuple[Row, ...]

    @cached_property
    def ours(self) -> Row | None:
        return _fastest(row for row in self.rows if row.role == Role.OURS)

    @cached_property
    def best_peer(self) -> Row | None:
        return _fastest(row for row in self.rows if row.role == Role.PEER)

    @cached_property
    def floor(self) -> float | None:
        return self.rows[0].floor_milliseconds

    @property
    def speed_up(self) -> float | None:
        """How many times faster than the best peer; below 1 where it is slower."""
        return _ratio(self.best_peer, self.ours)

    @property
    def over_floor(self) -> float | None:
        return self.ours.milliseconds / self.floor if self.ours and self.ours.milliseconds and self.floor else None

    @property
    def check(self) -> float | None:
        """The stock row's repetition over the stock row."""
        again = next((row for row in self.rows if row.role == Role.CHECK), None)
        if again is None:
            return None
        name = again.candidate.removesuffix(CHECK_SUFFIX)
        stock = next((row for row in self.rows if row.candidate == name and row.variant == again.variant), None)
        return _ratio(again, stock)

    @property
    def doubtful(self) -> bool:
        return self.check is not None and abs(self.check - 1) > CHECK_TOLERANCE

    def fastest(self, candidate: str) -> Row | None:
        """The candidate's best variant; None if none has a time."""
        return _fastest(row for row in self.rows if row.candidate == candidate)


def _fastest(rows: Iterable[Row]) -> Row | None:
    timed = [row for row in rows if row.milliseconds is not None]
    return min(timed, key=lambda row: row.milliseconds or 0.0, default=None)


def _ratio(above: Row | None, below: Row | None) -> float | None:
    if above is None or below is None or not above.milliseconds or not below.milliseconds:
        return None
    return above.milliseconds / below.milliseconds


def cases(data: Results, suite: str) -> list[CaseResult]:
    """The cases of a suite; one in several dtypes is several."""
    rows = results.rows(data, suite)
    dtypes = {row.dtype for row in rows}
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        name = row.case if dtypes == {"float32"} else f"{row.case}, {row.dtype}"
        grouped.setdefault(name, []).append(row)
    return [CaseResult(name, tuple(group)) for name, group in grouped.items()]


# --- tables ---------------------------------------------------------------------------------------------


def table(data: Results, markdown: bool = True) -> str:
    """Everything: one table a suite, with the reasons for missing numbers below it.

    In markdown, or narrower, for a terminal.
    """
    return "\n\n".join(_suite_table(data, suite, markdown) for suite in data["suites"])


def _suite_table(data: Results, suite: str, markdown: bool) -> str:
    part = data["suites"][suite]
    found = cases(data, suite)
    candidates = list(dict.fromkeys(row.candidate for case in found for row in case.rows if row.role != Role.CHECK))
    memory = any(row.peak_bytes is not None for case in found for row in case.rows)
    reasons: dict[str, int] = {}
    body = []
    for case in found:
        cells = [_cell(case, candidate, reasons) for candidate in candidates]
        body.append([case.name, *cells, *([] if memory else _verdict(case))])
    head = ["MB" if memory else "ms", *candidates]
    if not memory:
        head += ["best peer", "speed-up", "floor", "over floor", "check"]
    columns = [i for i in range(len(head)) if any(row[i] != "-" for row in body)]
    head, body = [head[i] for i in columns], [[row[i] for i in columns] for row in body]
    rounds = max((len(row.samples) for case in found for row in case.rows), default=0)
    lines = [
        f"### {part['title']}",
        "",
        taken_on(part["environment"]) + ("" if memory else f"; medians of {rounds} rounds") + ".",
        *(["A short run: fewer cases and rounds than a full one."] if part["settings"]["short"] else []),
        "",
        _grid(body, head, markdown),
    ]
    notes = [f"[{number}] {reason}  " for reason, number in reasons.items()]
    if any(case.doubtful for case in found):
        notes.append(f"(!) the same code timed twice differs by more than {CHECK_TOLERANCE:.0%}: distrust this row.")
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _grid(body: list[list[str]], head: list[str], markdown: bool) -> str:
    if markdown:
        return tabulate(body, head, tablefmt="github", disable_numparse=True)
    widths = [None if i == 0 else 20 if name == "best peer" else 12 for i, name in enumerate(head)]
    return tabulate(body, head, tablefmt="simple", disable_numparse=True, maxcolwidths=widths, maxheadercolwidths=11)


def _cell(case: CaseResult, candidate: str, reasons: dict[str, int]) -> str:
    """The best variant's number, or a reference to the reasons why there is none."""
    rows = [row for row in case.rows if row.candidate == candidate]
    if not rows:
        return "-"
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    if peaks:
        return f"{min(peaks) / 1e6:.1f}"
    fastest = case.fastest(candidate)
    failed = dict.fromkeys(f"{candidate}: {row.reason}" for row in rows if row.reason)
    notes = "".join(f" [{reasons.setdefault(reason, len(reasons) + 1)}]" for reason in failed)
    return (milliseconds(fastest.milliseconds) if fastest else "-") + notes


def _verdict(case: CaseResult) -> list[str]:
    best = case.best_peer
    return [
        f"{best.candidate}, {best.variant}" if best else "-",
        marked(case),
        milliseconds(case.floor),
        times(case.over_floor),
        "-" if case.check is None else f"{case.check:.2f}",
    ]


def milliseconds(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def marked(case: CaseResult) -> str:
    return times(case.speed_up) + (" (!)" if case.doubtful else "")


def taken_on(facts: dict[str, object]) -> str:
    versions = facts["versions"]
    assert isinstance(versions, dict)
    if "gpu" in facts:
        machine = f"{facts['gpu']}, driver {facts['driver']}; torch {versions['torch']}, triton {versions['triton']}"
        return f"{machine}; commit {str(facts['commit'])[:7]}, {str(facts['date'])[:10]}"
    named = ("torch", "onnxruntime", "openvino", "ai-edge-litert", "executorch")
    packages = ", ".join(f"{name} {versions[name]}" for name in named if versions.get(name))
    machine = f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}; {packages}; {facts['threads']} threads"
    return f"{machine}; commit {str(facts['commit'])[:7]}, {str(facts['date'])[:10]}"


# --- comparison -----------------------------------------------------------------------------------------

#: A speed-up that changed by more than this from one results file to another is marked.
MOVED = 0.10


def comparison(before: Results, after: Results) -> str:
    """The speed-ups of two results files, case by case, with those marked that moved.

    Raises:
        ValueError: if no case has a speed-up in both.
    """
    notes, body = [], []
    for suite in [suite for suite in before["suites"] if suite in after["suites"]]:
        notes.append(f"{suite}: {_taken(before, suite)} -> {_taken(after, suite)}")
        found = {case.name: case for case in cases(before, suite)}
        for case in cases(after, suite):
            was = found.get(case.name)
            if was is None or not was.speed_up or not case.speed_up:
                continue
            ratio = case.speed_up / was.speed_up
            cells = [
                [_named(side.best_peer), milliseconds(side.ours.milliseconds if side.ours else None), marked(side)]
                for side in (was, case)
            ]
            body.append([suite, case.name, *(cell for pair in zip(*cells, strict=True) for cell in pair)])
            body[-1] += [f"{ratio:.2f}", "moved" if abs(ratio - 1) > MOVED else ""]
    if not body:
        raise ValueError("expected two results files with a case that has a speed-up in both, got none")
    head = ["suite", "case", "best peer, ms", "now", "effattn, ms", "now", "speed-up", "now", "ratio", ""]
    return "\n".join([tabulate(body, head, tablefmt="simple", disable_numparse=True), "", *notes])


def _taken(data: Results, suite: str) -> str:
    """Where, and by which protocols: rows from before protocols had names name none."""
    protocols = sorted({row.protocol for row in results.rows(data, suite) if row.protocol})
    machine = taken_on(data["suites"][suite]["environment"])
    return f"{machine}; protocol {', '.join(protocols)}" if protocols else machine


def _named(row: Row | None) -> str:
    return f"{row.candidate} {milliseconds(row.milliseconds)}" if row else "-"


# --- README ---------------------------------------------------------------------------------------------

#: The cases that the README shows, wins and losses, and what they are called there.
README_CASES = {
    ("attention", "b1 stage 3 @1024x2048"): "ReLU linear attention, 32768 tokens",
    ("training", "b1 stage 3 @224, batch 32"): "the same, forward and backward, 32 x 196 tokens",
    ("lite-mla", "b1 stage 3 @224"): "LiteMLA module, 14 x 14",
    ("lite-mla-training", "b1 stage 3 @1024x2048"): "LiteMLA training step, 128 x 256",
    ("softmax", "CGA m4 stage 1, 4 windows"): "cascaded group attention module, 14 x 14",
    ("softmax", "EfficientFormer-L1, batch 1"): "EfficientFormer attention module, 7 x 7",
    ("efficientvit", "efficientvit_b1 @1024x2048"): "whole efficientvit_b1 @1024x2048",
    ("efficientvit", "efficientvit_b1 @224"): "whole efficientvit_b1 @224",
    ("softmax-models", "efficientvit_m4 @224"): "whole efficientvit_m4 @224",
    ("engines", "efficientvit_b1 @1024x2048"): "in an engine: efficientvit_b1 @1024x2048",
    ("engines", "efficientvit_b1 @224"): "in an engine: efficientvit_b1 @224",
    ("engines", "efficientvit_m4 @224"): "in an engine: efficientvit_m4 @224",
}
#: Peers that are no PyTorch.
RUNTIMES = ("onnxruntime", "OpenVINO", "TFLite", "ExecuTorch")
#: The suites of the full table, and what they are called there.
README_SUITES = {
    "attention": "attention, inference",
    "training": "attention, training step",
    "lite-mla": "LiteMLA, inference",
    "lite-mla-training": "LiteMLA, training step",
    "efficientvit": "whole model, inference",
    "softmax": "softmax attention, inference",
    "softmax-training": "softmax attention, training step",
    "softmax-models": "whole model, inference",
}


def summary_table(files: list[Results]) -> str:
    """The README's cases, each from the last of the files that has it, against PyTorch and against other runtimes."""
    machines: dict[str, None] = {}
    body = []
    for (suite, name), label in README_CASES.items():
        for data in [data for data in files if suite in data["suites"]][-1:]:
            for case in (case for case in cases(data, suite) if case.name == name):
                machines[taken_on(data["suites"][suite]["environment"])] = None
                peers = [row for row in case.rows if row.role == Role.PEER]
                torch = _fastest(row for row in peers if row.candidate not in RUNTIMES)
                runtime = _fastest(row for row in peers if row.candidate in RUNTIMES)
                lost = ", slower" if case.speed_up is not None and case.speed_up < 1 else ""
                ours = milliseconds(case.ours.milliseconds if case.ours else None)
                body.append([label, _named(torch), _named(runtime), ours, marked(case) + lost])
    head = ["CPU, float32", "best PyTorch, ms", "best runtime, ms", "effattn, ms", "against the best"]
    notes = "  \n".join(f"{machine}." for machine in machines)
    return "\n".join([tabulate(body, head, tablefmt="github", disable_numparse=True), "", notes])


def readme_table(files: list[Results]) -> str:
    """Every case, each from the last of the files that has it, which it names by a number."""
    machines: dict[str, int] = {}

    def number_of(data: Results, suite: str) -> int:
        return machines.setdefault(taken_on(data["suites"][suite]["environment"]), len(machines) + 1)

    def last_with(suite: str) -> list[Results]:
        return [data for data in files if suite in data["suites"]][-1:]

    rested = {case.name: case for data in last_with("rested") for case in cases(data, "rested")}
    body = []
    for suite, label in README_SUITES.items():
        for data in last_with(suite):
            number = number_of(data, suite)
            for case in cases(data, suite):
                row = [
                    f"{label} [{number}]",
                    case.name,
                    _named(case.best_peer),
                    milliseconds(case.ours.milliseconds if case.ours else None),
                    marked(case),
                    milliseconds(case.floor),
                ]
                if rested:
                    first = rested.get(f"{suite}: {case.name}")  # as suites/rests.py names it
                    row.append(marked(first) if first else "-")
                body.append(row)
    head = ["", "case", "best peer, ms", "effattn, ms", "speed-up", "floor, ms"]
    head += [f"speed-up, first call after a rest [{number_of(data, 'rested')}]" for data in last_with("rested")]
    notes = "  \n".join(f"[{number}] {machine}." for machine, number in machines.items())
    return "\n".join([tabulate(body, head, tablefmt="github", disable_numparse=True), "", notes])


def engine_table(files: list[Results], suite: str) -> str:
    """Each engine with effattn's nodes against the same engine without, from the last of the files that has the suite.

    Raises:
        ValueError: if none has it.
    """
    data = next((data for data in reversed(files) if suite in data["suites"]), None)
    if data is None:
        raise ValueError(f"expected a results file with the suite {suite}")
    return f"{_engine_table(cases(data, suite))}\n\n{taken_on(data['suites'][suite]['environment'])}."


def _engine_table(found: list[CaseResult]) -> str:
    engines = [name for name in RUNTIMES if any(case.fastest(name) for case in found)]
    accelerated = any(case.fastest("effattn eager") for case in found)
    body: dict[str, list[str]] = {}
    for case in found:
        label = case.name
        for engine in engines:  # of a single node or a session, a case an engine
            label = label.removesuffix(f", {engine}")
        cells = body.setdefault(label, [label, *("-" for _ in engines)])
        for i, engine in enumerate(engines, start=1):
            stock, ours = case.fastest(engine), case.fastest(f"effattn in {engine}")
            if stock is not None or ours is not None:
                cells[i] = f"{_time(stock)} -> {_time(ours)}, {times(_ratio(stock, ours))}"
        if accelerated:
            cells += [_time(case.fastest("effattn eager")), marked(case)]
    head = ["ms", *(f"{engine} -> with effattn" for engine in engines)]
    head += ["accelerated PyTorch", "best of effattn against the best engine"] * accelerated
    return tabulate(list(body.values()), head, tablefmt="github", disable_numparse=True)


def _time(row: Row | None) -> str:
    return milliseconds(row.milliseconds if row else None)


def update_between(readme: Path, begin: str, end: str, content: str) -> None:
    """Puts ``content`` between the two markers.

    Raises:
        ValueError: if the file does not have each marker once, in order.
    """
    text = readme.read_text()
    between = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if text.count(begin) != 1 or text.count(end) != 1 or not between.search(text):
        raise ValueError(f"{readme}: expected the markers {begin} and {end}, each once, in this order")
    readme.write_text(between.sub(lambda _: f"{begin}\n{content}\n{end}", text))
