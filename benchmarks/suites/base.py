"""What a suite is, and the common kind: cases whose candidates are timed in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from benchmarks import runner
from benchmarks.floor import Rates
from benchmarks.modules import ModuleCase, make_case
from benchmarks.runner import Case, Row, Tick


@dataclass(frozen=True)
class Settings:
    """``only`` keeps the cases whose name contains one of its strings; empty keeps all."""

    rounds: int
    short: bool = False
    only: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        return not self.only or any(part.lower() in name.lower() for part in self.only)


@dataclass(frozen=True)
class TimedSuite:
    """``cases`` gives the cases of a short or a full run; ``rounds_factor`` is for samples of a single call.

    ``allocator`` has the allocator's settings where they are not those of this process.
    """

    name: str
    title: str
    cases: Callable[[bool], list[Case]]
    allocator: dict[str, str] | None = None
    rounds_factor: int = 1

    def selected(self, settings: Settings) -> list[Case]:
        return [case for case in self.cases(settings.short) if settings.keeps(case.name)]

    def steps(self, settings: Settings) -> int:
        return sum(runner.steps(case, self.rounds_factor * settings.rounds) for case in self.selected(settings))

    def run(self, settings: Settings, rates: Rates, tick: Tick) -> list[Row]:
        cases = self.selected(settings)
        rows: list[Row] = []
        for case in cases:
            rates.measure({case.dtype})
            rows += runner.measure(self.name, case, self.rounds_factor * settings.rounds, tick)
        rates.measure({case.dtype for case in cases})
        runner.write_floors(rows, cases, rates)
        return rows


def module_suite(
    name: str, title: str, cases: Sequence[ModuleCase], short: Collection[str] = (), *, training: bool = False
) -> TimedSuite:
    """Of a short run, only those cases that ``short`` names."""
    return TimedSuite(
        name, title, lambda is_short: [make_case(c, training) for c in cases if not is_short or c.name in short]
    )
