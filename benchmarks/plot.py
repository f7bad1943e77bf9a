"""Pictures of a results file: speed-ups over the best peer, and time over the number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

from matplotlib import pyplot as plt  # after the backend is chosen
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks import report
from benchmarks.report import CaseResult
from benchmarks.results import Results

# Okabe and Ito's palette, which every kind of colour vision tells apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8C8C8C"
DASHES = (0, (4, 3))
FLOOR_MARK: dict[str, Any] = {"marker": "|", "markersize": 20, "markeredgewidth": 2.5}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}
SPEED_UP_SUITES = ("attention", "narrow", "training")


def draw(data: Results, stem: Path) -> list[Path]:
    """Writes ``stem``.png and ``stem``-scaling.png, as far as there is something to show."""
    written = []
    with plt.rc_context(STYLE):
        panels = [(s, [c for c in report.cases(data, s) if c.speed_up]) for s in SPEED_UP_SUITES if s in data["suites"]]
        panels = [(suite, found) for suite, found in panels if found]
        if panels:
            written.append(_draw_speed_ups(data, panels, stem.with_name(stem.name + ".png")))
        scaling = report.cases(data, "scaling") if "scaling" in data["suites"] else []
        if len(scaling) > 1:
            written.append(_draw_scaling(data, scaling, stem.with_name(stem.name + "-scaling.png")))
    return written


def _draw_speed_ups(data: Results, panels: list[tuple[str, list[CaseResult]]], path: Path) -> Path:
    sizes = [len(found) for _, found in panels]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(9, 1.0 + sum(0.5 * size + 0.9 for size in sizes)),
        height_ratios=[size + 0.5 for size in sizes],
        squeeze=False,
        layout="constrained",
    )
    for (suite, found), ax in zip(panels, axes[:, 0], strict=True):
        _bars(ax, found)
        ax.set_title(data["suites"][suite]["title"], fontsize=10)
    axes[-1, 0].set_xlabel("speed-up over the best peer (times)")
    slower = any((case.speed_up or 1) < 1 for _, found in panels for case in found)
    handles: list[Artist] = [
        Patch(color=BLUE, label="effattn, faster"),
        *([Patch(color=VERMILION, label="effattn, slower")] if slower else []),
        Line2D([], [], color="black", linewidth=0.8, linestyle=DASHES, label="best peer"),
        Line2D([], [], color=ORANGE, linestyle="none", label="floor of the machine", **FLOOR_MARK),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    figure.supxlabel(_machine(data), x=0.01, ha="left", fontsize=8, color=GREY)
    figure.savefig(path)
    plt.close(figure)
    return path


def _bars(ax: Axes, found: list[CaseResult]) -> None:
    """One bar a case; a mark shows where the floor would be, an arrow that it is out of the picture."""
    speed_ups = [case.speed_up or 0.0 for case in found]
    limit = max(*speed_ups, 1.0) * 1.7
    colours = [BLUE if value >= 1 else VERMILION for value in speed_ups]
    ax.barh(range(len(found)), speed_ups, height=0.6, color=colours)
    for place, (case, value) in enumerate(zip(found, speed_ups, strict=True)):
        best = case.best_peer
        assert best is not None and best.milliseconds is not None
        if case.floor:
            at = best.milliseconds / case.floor
            inside = at <= limit
            mark = FLOOR_MARK if inside else {"marker": ">", "markersize": 6}
            ax.plot(min(at, limit), place, color=ORANGE, linestyle="none", clip_on=False, **mark)
            if not inside:
                ax.annotate(
                    report.times(at),
                    (limit, place),
                    (6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=GREY,
                )
        label = report.times(value) + (" (!)" if case.doubtful else "")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        ax.annotate(
            label, (value, place), (5, 0), textcoords="offset points", va="center", weight="bold", fontsize=9, bbox=box
        )
    ax.axvline(1, color="black", linewidth=0.8, linestyle=DASHES)
    ax.set_yticks(range(len(found)), [_bar_name(case) for case in found], fontsize=8.5)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.set_xlim(0, limit)


def _bar_name(case: CaseResult) -> str:
    best, ours = case.best_peer, case.ours
    assert best is not None and ours is not None
    peer = f"{report.milliseconds(best.milliseconds)} ms {best.candidate}"
    return f"{case.name}\n{report.milliseconds(ours.milliseconds)} ms against {peer}"


def _draw_scaling(data: Results, found: list[CaseResult], path: Path) -> Path:
    """Time over tokens, log-log."""
    tokens = [int(case.name.split()[0]) for case in found]  # a case is called "N tokens"
    lines = {
        "softmax (SDPA)": (VERMILION, "s", "softmax attention (SDPA)"),
        "official eager": (PURPLE, "^", "ReLU linear attention, eager"),
        "official compiled": (GREEN, "D", "ReLU linear attention, torch.compile"),
        "effattn": (BLUE, "o", "effattn"),
    }
    figure, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, (colour, marker, label) in lines.items():
        points = [(n, row.milliseconds) for n, case in zip(tokens, found, strict=True) if (row := case.fastest(name))]
        if points:
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label, linewidth=2)
    floors = [(n, case.floor) for n, case in zip(tokens, found, strict=True) if case.floor]
    if floors:
        ax.plot(*zip(*floors, strict=True), color=GREY, linestyle=DASHES, label="floor: bytes or operations")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(tokens, [f"{n:,}" for n in tokens])
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    ax.set_xlabel("tokens")
    ax.set_ylabel("milliseconds")
    ax.set_title(data["suites"]["scaling"]["title"], fontsize=10)
    ax.legend(frameon=False)
    ax.text(0, -0.14, _machine(data), transform=ax.transAxes, fontsize=8, color=GREY, va="top")
    figure.savefig(path)
    plt.close(figure)
    return path


def _machine(data: Results) -> str:
    facts = next(iter(data["suites"].values()))["environment"]
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}, torch {facts['versions']['torch']}, "
        f"commit {(facts['commit'] or 'unknown')[:7]}{' with changes' if facts['dirty'] else ''}"
    )
