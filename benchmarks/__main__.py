"""The command line. Modules that load torch are imported inside the commands: see environment.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks import environment

if TYPE_CHECKING:
    from benchmarks.results import Results

FULL_ROUNDS, SHORT_ROUNDS = 15, 5
RESULTS = environment.ROOT / "benchmarks" / "results"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    suite: Annotated[
        list[str] | None, typer.Option(help="Which suites (benchmarks/README.md), or all; may be repeated.")
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="Fewer cases and rounds: under five minutes.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of each candidate.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Cases whose name contains this; may be repeated.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measures, prints the tables, and writes JSON, markdown and pictures."""
    environment.restart_with_kept_heap()
    environment.use_private_compile_cache()
    from tqdm import tqdm

    from benchmarks import results
    from benchmarks.floor import Rates
    from benchmarks.suites import SUITES, Settings

    settings = Settings(rounds or (SHORT_ROUNDS if short else FULL_ROUNDS), short, tuple(only or ()))
    for name in suite or ():
        if name not in (*SUITES, "all"):
            raise typer.BadParameter(f"expected {', '.join(SUITES)} or all, got {name}", param_hint="--suite")
    names = list(SUITES) if not suite or "all" in suite else [name for name in SUITES if name in suite]
    chosen = {name: steps for name in names if (steps := SUITES[name].steps(settings))}
    if not chosen:
        raise typer.BadParameter("no case of these suites has such a name", param_hint="--only")
    facts = environment.facts()
    path = output / results.file_name(facts, settings)
    data = results.read_or_new(path)
    rates = Rates()
    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=sum(chosen.values()), dynamic_ncols=True, bar_format=_BAR, mininterval=0.1 if on_terminal else 10
    ) as bar:

        def tick(doing: str, steps: int) -> None:
            bar.set_postfix_str(doing, refresh=on_terminal)
            bar.update(steps)

        for name in chosen:
            rows = SUITES[name].run(settings, rates, tick)
            # When it was taken; the code is what it was at the start.
            taken = facts | {"date": environment.now(), "load_average": environment.load_average()}
            suite_of_name = SUITES[name]
            results.add(data, name, suite_of_name.title, settings, taken, rates, rows, suite_of_name.allocator)
            results.write(path, data)  # suite by suite: an interrupted run keeps what it has
    _present(data, path)


_BAR = "{percentage:3.0f}%|{bar:30}| {elapsed}<{remaining} {postfix}"


def _present(data: Results, path: Path) -> None:
    from benchmarks import plot, report

    markdown = path.with_suffix(".md")
    markdown.write_text(report.table(data) + "\n")
    typer.echo(report.table(data, markdown=False) + "\n")
    for written in (path, markdown, *plot.draw(data, path.with_suffix(""))):
        typer.echo(f"wrote {written}")


@app.command()
def gpu(
    suite: Annotated[list[str] | None, typer.Option(help="Which suites; may be repeated.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="It ends within this, and tests and profiles too (make gpu: 520).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each candidate.")] = 9,
    only: Annotated[list[str] | None, typer.Option(help="Cases whose name contains this; may be repeated.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results, emptied first; $OUT, or build/gpu.")
    ] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Stand-ins for the GPU and its kernels.")] = False,
) -> None:
    """Tries every kernel on a GPU and measures it, each in a process of its own; gpu-report makes tables of it.

    Without --seconds all cases of all suites are measured, with every mode of torch.compile, and nothing is tested or
    profiled; with it, what matters most comes first, and stages get more time in proportion: benchmarks/gpu/plan.py.
    """
    from benchmarks.gpu.plan import BUDGETS, MEASURING, Run, Settings

    default = "gpu-rehearsal" if rehearse else "gpu"
    folder = output or Path(os.environ.get("OUT") or environment.ROOT / "build" / default)
    settings = Settings(
        folder.resolve(),
        seconds,
        MEASURING if seconds is None else tuple(BUDGETS),
        tuple(suite or ()),
        tuple(only or ()),
        rounds,
        rehearse,
    )
    status = Run(settings).run()
    typer.echo(f"{folder}: results.jsonl, summary.md, log.txt")
    raise typer.Exit(status)


@app.command()
def gpu_report(
    lines: Annotated[Path, typer.Argument(help="results.jsonl of a run on a GPU.")],
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    target: Annotated[Path, typer.Option(help="The README.")] = environment.ROOT / "README.md",
) -> None:
    """Makes a results file and its tables of a run on a GPU, and replaces the table in the README."""
    from benchmarks.gpu import report as gpu_report_of

    for written in gpu_report_of.write(lines, output, target):
        typer.echo(f"wrote {written}")


@app.command()
def accuracy(
    model: Annotated[list[str] | None, typer.Option(help="Which models of timm; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Of weights and input.")] = 20,
    size: Annotated[int, typer.Option(min=32, help="Rows and columns of the image.")] = 224,
) -> None:
    """Prints how far models under bfloat16 autocast are from float64, accelerated and stock."""
    from benchmarks import accuracy as suite

    typer.echo(suite.table(model or suite.MODELS, seeds, size))


@app.command()
def table(file: Path) -> None:
    """Prints the tables of a results file, in markdown."""
    from benchmarks import report, results

    typer.echo(report.table(results.read(file)))


@app.command()
def compare(before: Path, after: Path) -> None:
    """Prints the speed-ups of two results files beside each other, and marks those that moved by more than a tenth."""
    from benchmarks import report, results

    try:
        typer.echo(report.comparison(results.read(before), results.read(after)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def plot(file: Path) -> None:
    """Draws the pictures of a results file beside it."""
    from benchmarks import results
    from benchmarks.plot import draw

    for written in draw(results.read(file), file.with_suffix("")):
        typer.echo(f"wrote {written}")


@app.command()
def readme(
    files: list[Path], target: Annotated[Path, typer.Option(help="The README.")] = environment.ROOT / "README.md"
) -> None:
    """Puts the cases that stand in the README between its markers; the site has all of them (docs/benchmarks.md)."""
    from benchmarks import report, results

    table = report.summary_table([results.read(file) for file in files])
    report.update_between(target, report.README_BEGIN, report.README_END, table)
    typer.echo(f"wrote {target}")


@app.command(hidden=True)
def child(job: str) -> None:
    """Does one job in this process, whatever its allocator; see child.py."""
    environment.use_private_compile_cache()
    from benchmarks.child import answer

    typer.echo(answer(job))


if __name__ == "__main__":
    app()
