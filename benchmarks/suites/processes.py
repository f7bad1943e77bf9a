"""What needs a fresh process: peak memory of training, and speed with the allocator left alone."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import child, environment, modules
from benchmarks import linear_attention as rla
from benchmarks.child import Job
from benchmarks.floor import Rates
from benchmarks.runner import Row, Tick, explain
from benchmarks.suites.attention import ATTENTION, TRAINING, TRAINING_CASES, TRAINING_SHORT
from benchmarks.suites.base import Settings
from benchmarks.suites.lite_mla import LITE_MLA_TRAINING

#: By suite: the candidates of interest, and the variant of theirs.
CANDIDATES = {
    ATTENTION.name: ((rla.STOCK, "official compiled", rla.OURS), rla.LAYOUTS[0]),
    TRAINING.name: ((rla.STOCK, "official compiled", rla.OURS), rla.LAYOUTS[0]),
    LITE_MLA_TRAINING.name: ((modules.STOCK, "stock compiled", f"{modules.OURS} eager"), "NCHW"),
}
#: Steps of progress for one job: about what it takes in time.
STEPS = 50


@dataclass(frozen=True)
class ProcessSuite:
    """``full`` and ``short`` list (suite, case); ``together`` puts the candidates of a case in one process."""

    name: str
    title: str
    kind: str
    allocator: dict[str, str]
    together: bool
    full: tuple[tuple[str, str], ...]
    short: tuple[tuple[str, str], ...]

    def _jobs(self, settings: Settings) -> list[Job]:
        jobs = []
        for suite, case in self.short if settings.short else self.full:
            candidates, variant = CANDIDATES[suite]
            # Compiling in a fresh process takes longest, and says least: a short run leaves it out.
            candidates = tuple(name for name in candidates if not (settings.short and "compiled" in name))
            groups = [candidates] if self.together else [(name,) for name in candidates]
            if settings.keeps(case):
                jobs += [Job(self.kind, suite, case, group, variant, settings.rounds) for group in groups]
        return jobs

    def steps(self, settings: Settings) -> int:
        return STEPS * len(self._jobs(settings))

    def run(self, settings: Settings, rates: Rates, tick: Tick) -> list[Row]:
        rows: list[Row] = []
        for job in self._jobs(settings):
            tick(f"{job.case}: {', '.join(job.candidates)}", 0)
            try:
                answered = child.run(job, self.allocator)
            except Exception as error:
                answered = [_failed(job, name, explain(error)) for name in job.candidates]
            for row in answered:
                row.suite, row.case = self.name, f"{job.case}, {job.suite}"
            rows += answered
            tick(f"{job.case}: {', '.join(job.candidates)}", STEPS)
        return rows


def _failed(job: Job, candidate: str, reason: str) -> Row:
    role = "ours" if candidate.startswith(rla.OURS) else "peer"
    return Row(job.suite, job.case, "float32", {}, candidate, job.variant, role, reason=reason)


_TRAINING = tuple((TRAINING.name, case.name) for case in TRAINING_CASES)
_MODULES = ((LITE_MLA_TRAINING.name, "b1 stage 3 @1024x2048"),)

MEMORY = ProcessSuite(
    "memory",
    "peak memory of forward and backward, above the inputs",
    "peak memory",
    environment.RETURN_MEMORY,
    together=False,
    full=_TRAINING + _MODULES,
    short=((TRAINING.name, TRAINING_SHORT[0]),),
)
ALLOCATOR = ProcessSuite(
    "allocator",
    "the allocator left alone, as a user finds it",
    "time",
    {},
    together=True,
    full=(
        (ATTENTION.name, "b3 stage 3 @224, batch 16"),
        (ATTENTION.name, "b1 stage 3 @1024x2048"),
        (TRAINING.name, "b1 stage 3 @224, batch 32"),
        (TRAINING.name, "b1 stage 3 @1024x2048"),
    ),
    short=((ATTENTION.name, "b1 stage 3 @1024x2048"),),
)
