"""A run on a GPU: stages with budgets, one after the other, so that the whole ends in time whatever happens.

Every process is started by :mod:`benchmarks.gpu.jobs` with a timeout. A stage that is out of its time is ended, what
it did not do gets lines that say so, and the next one begins. The time that a stage leaves over is the next one's. This
process imports no torch and touches no GPU: nothing that happens on one can end it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.gpu import faults, jobs, names, summary
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.lines import FAILED, Line, Status, Writer
from benchmarks.gpu.names import Kernel
from benchmarks.gpu.sensors import Sensors

ROOT = environment.ROOT
#: Where what is tested is built; kept between runs, so that a second one builds what changed.
STAGE = ROOT / "build" / "gpu-stage"
#: The files of a run, and no others.
RESULTS, LOG, SUMMARY, PROFILE, SANITIZER, VERDICTS = (
    "results.jsonl",
    "log.txt",
    "summary.md",
    "ncu.txt",
    "sanitizer.txt",
    "verdicts.json",
)
#: So often the summary is written again, if there is something new.
SUMMARY_SECONDS = 1.0
#: Of a limited run: kept for ending what runs and for the last summary.
RESERVE = 8.0
#: What the budgets are made for.
VISIT_SECONDS = 520.0


@dataclass(frozen=True)
class Budget:
    """Seconds of a stage in a run of ``VISIT_SECONDS``; up to ``most``, which is at the expense of the last stages."""

    seconds: float
    most: float = 0.0


#: In the order in which they are run.
BUDGETS = {
    "machine": Budget(10, most=90),  # a first import of torch, from a cold disk
    "build": Budget(35, most=230),
    "smoke": Budget(75),
    "main": Budget(140),
    "compiled": Budget(80),
    "tests": Budget(110),
    "profile": Budget(20),
    "memcheck": Budget(40),  # torch is imported, and a GPU's context made, under a tool
    "cases": Budget(0),
}
#: Of a run without a limit: what is measured, and what that needs.
MEASURING = ("machine", "build", "smoke", "main", "compiled", "cases")
#: Of the smoke stage, with fewer left nothing is tried again.
_RETRY_SECONDS = 20.0
#: What runs side by side, a job a core at most; those that are timed take turns (benchmarks/gpu/turns.py).
AT_ONCE = {"smoke": 12, "tests": 12, "compiled": 12}


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    ``seconds`` of all of it, None for no limit; ``suites`` and ``only`` (parts of names) leave cases out; a
    ``rehearsal`` takes stand-ins for the GPU, the kernels and the tests.
    """

    output: Path
    seconds: float | None = None
    stages: Sequence[str] = MEASURING
    suites: Sequence[str] = ()
    only: Sequence[str] = ()
    rounds: int = 9
    rehearsal: bool = False

    def keeps(self, case: str) -> bool:
        return (not self.suites or case.split(": ")[0] in self.suites) and (
            not self.only or any(text in case for text in self.only)
        )


def commit() -> str:
    """Of the sources, by EFFATTN_COMMIT where there is no git to ask."""
    return os.environ.get("EFFATTN_COMMIT") or environment.git("rev-parse", "HEAD") or "unknown"


class Run:
    """A run, and what it has found out."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.begin = time.monotonic()
        # CUDA's tools where its installer puts them, if PATH has no others.
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
        self.end = self.begin + settings.seconds if settings.seconds is not None else float("inf")
        settings.output.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, LOG, SUMMARY, f"{SUMMARY}.new", PROFILE, SANITIZER, VERDICTS):
            (settings.output / name).unlink(missing_ok=True)  # of an earlier run
        # What every line has, as far as it is known.
        self.facts: Line = {"commit": commit(), "gpu": "unknown", "driver": "unknown", "versions": {}}
        self.sensors = Sensors()
        self.writer = Writer(settings.output / RESULTS, lambda: self.facts | self.sensors.clocks)
        self.log = jobs.Log(settings.output / LOG)
        self.stage = ""
        self.until = self.end
        self.machine: Line = {}
        self.backends: Line = {}
        self.quarantine: dict[Kernel, Line] = {}
        self._over = threading.Event()
        self._summarizing = threading.Lock()
        self._temporary = Path(tempfile.mkdtemp(prefix="effattn-gpu-"))

    # --- the course of it ---------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs all stages; returns 0 if every line is as it should be, 1 if not, 2 if nothing could be run."""
        steps: dict[str, Callable[[], None]] = {
            "machine": self.look_at_machine,
            "build": self.build,
            "smoke": self.smoke,
            "main": self.measure_main_cases,
            "compiled": self.measure_compiled,
            "tests": self.test,
            "profile": self.profile,
            "memcheck": self.check_memory,
            "cases": self.measure_other_cases,
        }
        spare = 0.0
        with self._watched():
            for name in (name for name in BUDGETS if name in self.settings.stages):
                self.stage = name
                now = time.monotonic()
                usual = now + self._scaled(BUDGETS[name].seconds) + spare
                longest = max(usual, now + self._scaled(BUDGETS[name].most))
                last = self.end - min(RESERVE, 0.2 * (self.end - self.begin))
                self.until = last if name == "cases" else min(longest, last)
                self._say(f"--- {name}")
                try:
                    steps[name]()
                except Exception as error:  # of the plan itself: the other stages still are of use
                    self.line(f"stage {name}", Status.ERROR, reason=f"{type(error).__name__}: {error}")
                spare = max(0.0, usual - time.monotonic())
                self.summarize()
                if name == "build" and not self.backends:
                    self._say("nothing can be run")
                    break
        return 2 if not self.backends else int(any(line["status"] in FAILED for line in self.writer.lines))

    def _scaled(self, seconds: float) -> float:
        return float("inf") if self.settings.seconds is None else seconds * self.settings.seconds / VISIT_SECONDS

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Ends everything at the end, even if this process hangs, and leaves no process behind."""

        def end() -> None:
            jobs.kill_all()
            os._exit(3)

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        watchdog = None
        if self.settings.seconds is not None:
            watchdog = threading.Timer(self.settings.seconds, end)
            watchdog.daemon = True
            watchdog.start()
        threading.Thread(target=self._keep_summary, daemon=True).start()
        try:
            yield
        finally:
            self._over.set()
            if watchdog is not None:
                watchdog.cancel()
            jobs.kill_all()
            self.sensors.close()
            self.summarize()
            if self.writer.lines:
                self._say(summary.brief(self.writer.lines, self.settings.stages, time.monotonic() - self.begin))
            shutil.rmtree(self._temporary, ignore_errors=True)

    def line(self, name: str, status: Status | str, **figures: Any) -> Line:
        line = self.writer.write(self.stage, name, status, **figures)
        reason = f": {line['reason']}" if line.get("reason") else ""
        if status != Status.OK or ("row" not in figures and self.stage != "tests"):
            self._say(f"{line['at']:6.1f} s  {status:8} {name}{reason}")
        return line

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _keep_summary(self) -> None:
        """Whoever kills this process finds what was known a second ago, whatever the stage waits for."""
        known = 0
        while not self._over.wait(SUMMARY_SECONDS):
            if len(self.writer.lines) > known:
                known = len(self.writer.lines)
                self.summarize()

    def summarize(self) -> None:
        with self._summarizing:
            seconds = time.monotonic() - self.begin
            text = summary.of(list(self.writer.lines), self.settings.stages, seconds)
            # At once: a file that is cut off would be of less use than the one before.
            beside = self.settings.output / f"{SUMMARY}.new"
            beside.write_text(text)
            beside.replace(self.settings.output / SUMMARY)

    def _run(self, all_jobs: Sequence[Job], heard: jobs.Heard | None = None, at_once: int | None = None) -> None:
        """The jobs of this stage; what they tell becomes lines."""

        def write(name: str, status: str, figures: dict[str, Any]) -> None:
            self.line(name, status, **figures)
            if heard is not None:
                heard(name, status, figures)

        at_once = max(1, min(at_once or AT_ONCE.get(self.stage, 1), os.cpu_count() or 1))
        if self.stage == "compiled" and self.settings.seconds is None:
            at_once = 1  # max-autotune times kernels while it compiles
        jobs.run(all_jobs, self.until, write, self.log, at_once)

    def _python(self, *command: str) -> list[str]:
        return [sys.executable, *command]

    def _environment(self, **more: str) -> dict[str, str]:
        """Of processes that use what was built."""
        stage = [] if self.settings.rehearsal else [str(STAGE)]
        told = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        path = os.pathsep.join([*stage, *told, str(ROOT)])
        found = {
            "PYTHONPATH": path,
            "PYTHONSAFEPATH": "1",  # not this folder's effattn, which has no kernels/ in it
            "EFFATTN_VERDICTS": "",
            "EFFATTN_ROUNDS": str(self.settings.rounds),
            "TORCHINDUCTOR_CACHE_DIR": str(self._temporary / "inductor"),
            **more,
        }
        if self.settings.rehearsal:
            found |= {"EFFATTN_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
            found["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "1")
        return found

    # --- stages -------------------------------------------------------------------------------------------

    def look_at_machine(self) -> None:
        def heard(name: str, status: str, figures: dict[str, Any]) -> None:
            if "versions" in figures:
                self.machine = figures
                self.facts["versions"] = {k: figures["versions"].get(k) for k in ("torch", "triton", "cuda", "nvcc")}
                self.facts["gpu"] = figures.get("gpu", "rehearsal" if self.settings.rehearsal else "unknown")
                self.facts["driver"] = figures.get("driver", "none")

        asked = self.settings
        only = [*asked.suites, *asked.only]
        self.line(
            "run",
            Status.OK,
            limit=asked.seconds,
            only=only,
            stages=list(asked.stages),
            rounds=asked.rounds,
            rehearsal=asked.rehearsal,
        )
        command = self._python("-m", "benchmarks.gpu.machine")
        self._run([Job("machine", command, limit=90, least=1, line=False)], heard)
        if not self.machine and not self.settings.rehearsal:
            self._look_without_torch()
        if self.machine.get("missing"):
            self.line("packages", Status.ERROR, reason=f"this Python lacks {', '.join(self.machine['missing'])}")
        if "gpu" not in self.machine and not self.settings.rehearsal:
            self.line("gpu", Status.ERROR, reason="torch sees no GPU")

    def _look_without_torch(self) -> None:
        """What a build needs to know, where torch did not import in time: the next process may."""
        command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=15).stdout.splitlines()
            gpu, driver, capability = (part.strip() for part in told[0].split(","))
        except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
            self.line("nvidia-smi", Status.ERROR, reason=f"{type(error).__name__}: {error}")
            return
        tools = [tool for tool in ("nvcc", "ncu", "compute-sanitizer") if shutil.which(tool)]
        self.machine = {"gpu": gpu, "driver": driver, "capability": capability, "tools": tools, "missing": []}
        self.facts |= {"gpu": gpu, "driver": driver}
        self.line("nvidia-smi", Status.OK, **self.machine)

    def build(self) -> None:
        """In a rehearsal nothing is built: what is importable is taken.

        If the CUDA kernels cannot be built, or not in time, Triton's and the peers are still measured.
        """
        if self.settings.rehearsal:
            self._ask_backends()
        elif "gpu" not in self.machine:
            self.line("build", Status.NOT_RUN, reason="there is no GPU to build for")
        else:
            with_cuda = "nvcc" in self.machine["tools"] and self._build(with_cuda=True, reserve=60)
            if with_cuda or self._build(with_cuda=False, reserve=0):
                self._ask_backends()
            if not self.backends:  # once more: what ended a process may not end the next
                self._ask_backends()

    def _build(self, *, with_cuda: bool, reserve: float) -> bool:
        """Whether it was done, in the time that is left but for the reserve."""
        built = []

        def heard(name: str, status: str, figures: dict[str, Any]) -> None:
            built.append("built" in figures and status == Status.OK)

        major, minor = self.machine["capability"].split(".")
        arch = f"{major}{minor}" + ("a" if int(major) >= 9 else "")
        told = {"EFFATTN_CUDA_ARCHS": arch, "EFFATTN_CUDA": str(int(with_cuda))}
        command = self._python("-m", "benchmarks.gpu.staging", str(STAGE))
        limit = max(30.0, min(600.0, self.until - time.monotonic() - reserve))
        name = "building" if with_cuda else "building without CUDA"
        self._run([Job(name, command, limit=limit, environment=told, line=False)], heard)
        return any(built)

    def _ask_backends(self) -> None:
        def heard(name: str, status: str, figures: dict[str, Any]) -> None:
            if "identities" in figures and status == Status.OK:
                self.backends = figures

        command = self._python("-m", "benchmarks.gpu.backends")
        self._run([Job("backends", command, limit=60, environment=self._environment(), least=1, line=False)], heard)
        known = self.backends.get("cases", [])
        if known and not any(self.settings.keeps(case) for case in known):
            asked = ", ".join([*self.settings.suites, *self.settings.only])
            reason = f"no case is of these suites and called like that: {asked}; there are {'; '.join(known)}"
            self.line("cases", Status.ERROR, reason=reason)
            self.backends = {}

    def smoke(self) -> None:
        """Every kernel in a process of its own; what fails is quarantined, and a verdict says so."""
        kernels: dict[str, Kernel] = {}
        for kernel in self._kernels():
            kernels[str(kernel)] = kernel
            if (kernel.operator, kernel.dtype) == (self.backends["smoke"][0], names.DTYPES[0]):
                kernels[f"{kernel}{names.OVERLAPPED}"] = kernel
        blocking = self._environment(CUDA_LAUNCH_BLOCKING="1", OMP_NUM_THREADS="2")
        all_jobs = [
            Job(
                name,
                self._python(
                    "-m", "benchmarks.gpu.smoke", *kernel, *([] if name == str(kernel) else [names.OVERLAPPED])
                ),
                limit=35,
                item_limit=4 if kernel.operator in faults.NAMES else 20,
                environment=blocking if name == str(kernel) else {**blocking, "CUDA_LAUNCH_BLOCKING": "0"},
                line=False,
            )
            for name, kernel in kernels.items()
        ]

        tried: list[Kernel] = []
        again: list[Kernel] = []
        failed: dict[str, Line] = {}

        def heard(name: str, status: str, figures: dict[str, Any]) -> None:
            if status == Status.NOT_RUN:
                return
            if name.endswith(names.AGAIN):
                name = name.removesuffix(names.AGAIN)
                again.append(kernels[name])
            tried.append(kernels[name])
            failed.pop(name, None)
            if status != Status.OK:
                failed[name] = {"status": status, "reason": figures.get("reason") or ""}
            # However it was launched: a verdict knows nothing of that.
            self.quarantine = {kernels[name]: line for name, line in failed.items()}
            self._write_verdicts()

        self._write_verdicts()
        self._run(all_jobs, heard)
        # What took too long, or found no memory, did so beside others.
        unsure = [
            replace(job, name=job.name + names.AGAIN, command=[*job.command, names.AGAIN])
            for job in all_jobs
            if failed.get(job.name, {}).get("status") in (Status.TIMEOUT, Status.ERROR)
        ]
        if unsure and self.until - time.monotonic() > _RETRY_SECONDS:
            self._run(unsure, heard, at_once=2)
        if not self.settings.rehearsal:
            self._keep_verdicts(tried, again)

    def _kernels(self) -> list[Kernel]:
        """What the main cases take comes first. A backend that cannot be used gets a line instead."""
        for backend, reason in self.backends["unavailable"].items():
            self.line(f"all kernels: {backend}", Status.SKIPPED, reason=reason)
        here = [backend for backend in names.BACKENDS if backend in self.backends["devices"]]
        if self.settings.rehearsal:
            works = [Kernel(self.backends["smoke"][0], backend, "bfloat16", "backward") for backend in here]
            return [*works, *(Kernel(fault, at, "bfloat16", "forward") for at in here[:1] for fault in faults.NAMES)]
        return [
            Kernel(operator, backend, dtype, direction)
            for direction in names.DIRECTIONS
            for dtype in names.DTYPES
            for operator in self.backends["smoke"]
            for backend in here
        ]

    def _write_verdicts(self) -> None:
        """As effattn/verdicts.py reads them."""
        gpu, driver = self.backends["verdicts_of"]
        found = [
            {"gpu": gpu, "driver": driver, **kernel._asdict(), "operator": names.operator_of(kernel)}
            | {"identity": self.backends["identities"][kernel.backend], "commit": self.facts["commit"]}
            | {"status": str(line["status"]), "reason": str(line["reason"])}
            for kernel, line in self.quarantine.items()
        ]
        (self.settings.output / VERDICTS).write_text(json.dumps({"schema": 1, "verdicts": found}, indent=1) + "\n")

    def _keep_verdicts(self, tried: Sequence[Kernel], again: Sequence[Kernel]) -> None:
        """Where the registry looks for them unless it is told otherwise."""
        kernels = [json.dumps(tried), json.dumps(again)]
        command = self._python("-m", "benchmarks.gpu.keep", str(self.settings.output / VERDICTS), *kernels)
        self._run([Job("verdicts into the cache folder", command, limit=30, environment=self._environment(), least=1)])

    def measure_main_cases(self) -> None:
        self._measure(self._main(), "plain")

    def measure_compiled(self) -> None:
        main = self._main()[:1] if self.settings.rehearsal else self._main()
        self._measure(main, "compiled" if self.settings.seconds is not None else "compiled-all")

    def measure_other_cases(self) -> None:
        """Whole models first, then the other suites in turn."""
        main = set(self._main())
        rest = [case for case in self.backends["cases"] if case not in main and self.settings.keeps(case)]
        rest.sort(key=lambda case: not case.startswith("gpu-models"))
        self._measure(rest, "plain")
        if self.settings.seconds is None:
            self._measure(rest, "compiled-all")

    def _main(self) -> list[str]:
        return [case for case in self.backends["main"] if self.settings.keeps(case)]

    def _measure(self, cases: Sequence[str], part: str) -> None:
        all_jobs = []
        for case in cases:
            backends = [backend for backend in self.backends["devices"] if not self._is_quarantined(case, backend)]
            if part == "plain":
                self._tell_of_quarantined(case)
            all_jobs.append(
                Job(
                    f"{case}: {part}",
                    self._python("-m", "benchmarks.gpu.case", part, case),
                    limit=3600 if self.settings.seconds is None else 60 if part == "plain" else 120,
                    item_limit=40 if self.settings.seconds is not None else 900,
                    environment=self._environment(
                        EFFATTN_MEASURED_BACKENDS=" ".join(backends),
                        # A model takes what serves; a case of a kernel asks for it by name.
                        EFFATTN_VERDICTS=str(self.settings.output / VERDICTS) if case.startswith("gpu-models") else "",
                        # A stage's own: a process that cannot be ended keeps its lock.
                        **({names.GPU_LOCK: str(self._temporary / self.stage)} if self.stage in AT_ONCE else {}),
                        # Those that a process starts to compile for it know nothing of its turn.
                        **({"TORCHINDUCTOR_COMPILE_THREADS": "1"} if part == "compiled" else {}),
                    ),
                    line=False,
                )
            )
        self._run(all_jobs)

    def _is_quarantined(self, case: str, backend: str) -> bool:
        return names.kernel_of(case, backend, self.backends["operators"]) in self.quarantine

    def _tell_of_quarantined(self, case: str) -> None:
        for backend in self.backends["devices"]:
            if self._is_quarantined(case, backend):
                self.line(f"{case}: effattn {backend}", Status.SKIPPED, reason="quarantined by the smoke stage")

    def test(self) -> None:
        """In shards, those of CUDA first; what ends a process costs that test alone."""
        shards = AT_ONCE["tests"] if not self.settings.rehearsal else 1
        ends = {Status.CRASHED, Status.TIMEOUT}
        pairs = sorted({(names.operator_of(k), k.backend) for k, v in self.quarantine.items() if v["status"] in ends})
        tests = ["tests/device", "tests/conformance", "tests/triton", "--full", "--ignore=tests/triton/compiled"]
        if self.settings.rehearsal:
            tests = ["benchmarks/gpu/rehearsed_tests.py"]
        all_jobs = []
        for backend in names.BACKENDS if not self.settings.rehearsal else names.BACKENDS[:1]:
            if backend in self.backends["unavailable"] and not self.settings.rehearsal:
                continue
            for i in range(shards):
                told = {
                    "EFFATTN_TESTED_BACKEND": backend,
                    "EFFATTN_TEST_SHARD": f"{i}/{shards}",
                    "OMP_NUM_THREADS": "2",
                    "EFFATTN_QUARANTINE": json.dumps(pairs),
                }
                all_jobs.append(
                    Job(
                        f"tests of {backend}, part {i + 1} of {shards}",
                        self._pytest(*tests),
                        limit=3600,
                        item_limit=4 if self.settings.rehearsal else 60,
                        environment=self._environment(**told),
                        least=10,
                        line=False,
                    )
                )
        self._run(all_jobs)

    def _pytest(self, *arguments: str) -> list[str]:
        return self._python(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_plugin", *arguments
        )

    def check_memory(self) -> None:
        """CUDA's kernels under compute-sanitizer, with no cache of torch's to hide what lies between two tensors."""
        if not self._has_tool("compute-sanitizer") or not self._has_backend("cuda"):
            return
        # Of torch's kernels, which are not looked at, there are more than of ours.
        sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
        sanitizer += ["--kernel-regex", "kns=effattn"]
        self._run(
            [
                Job(
                    "memcheck of cuda",
                    [*sanitizer, *self._pytest("tests/device", "-m", "memcheck", "--full", "-k", "cuda")],
                    limit=600,
                    environment=self._environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
                    output=self.settings.output / SANITIZER,
                )
            ]
        )

    def profile(self) -> None:
        if not self._has_tool("ncu") or not self._has_backend("cuda"):
            return
        profiler = ["ncu", "--clock-control", "none", "--set", "basic", "--profile-from-start", "off"]
        self._run(
            [
                Job(
                    f"{case}: ncu",
                    [*profiler, *self._python("-m", "benchmarks.gpu.case", "profile", case)],
                    limit=60,
                    environment=self._environment(EFFATTN_MEASURED_BACKENDS="cuda"),
                    output=self.settings.output / PROFILE,
                )
                for case in self.backends["profiled"]
                if not self._is_quarantined(case, "cuda")
            ]
        )

    def _has_tool(self, tool: str) -> bool:
        there = tool in self.machine.get("tools", ())
        if not there:
            self.line(tool, Status.SKIPPED, reason=f"there is no {tool} here")
        return there

    def _has_backend(self, backend: str) -> bool:
        reason = self.backends["unavailable"].get(backend)
        if reason is not None:
            self.line(f"{self.stage} of {backend}", Status.SKIPPED, reason=reason)
        return reason is None
