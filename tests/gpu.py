"""Builds, tests, looks for faults of memory and measures on a machine with a GPU, in one go and within a time.

    python tests/gpu.py [--seconds 520] [--output build/gpu]

Needs no network: what effattn is built and tested with must be installed. Every step runs, whatever became of those
before it; logs, JSON and tables land in the output's folder ($OUT, where there is one), and a summary comes last.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = [sys.executable, "-m", "benchmarks", "gpu", "--rounds", "9", "--compiled", "1"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
#: A few of each operator's kernels, forward and backward, small enough for instrumented code.
SMALL = [
    "tests/device/test_relu_linear_attention.py::test_against_float64",
    "tests/device/test_multi_scale.py::test_memory_formats_against_float64",
    "tests/device/test_multi_scale.py::test_narrow_types_against_float64",
    "tests/device/test_biased_attention.py::test_numbers_of_talking_heads",
    "tests/device/test_cascaded_group_attention.py::test_programs_that_take_several_windows",
]
#: Whether the CUDA kernels can be used, or why not.
CUDA = "import sys; from effattn.backends import cuda; sys.exit(cuda.BACKEND.unavailable())"
#: Kept for the benchmark, whatever the steps before it would like.
RESERVED = 240
#: What building and testing need beside Python: module, and the package that has it.
NEEDED = {
    **{name: name for name in ("torch", "triton", "setuptools", "pybind11", "ninja", "pytest", "hypothesis", "timm")},
    **{name: name for name in ("typer", "tabulate", "tqdm")},
    "xdist": "pytest-xdist",
}


@dataclass(frozen=True)
class Step:
    """``most`` seconds are spent on it, or what is left; ``tools`` are what it needs beside Python.

    A step that ``may_end_early`` is no failure if its time is over: what it has seen until then was right.
    """

    name: str
    command: list[str]
    most: float
    tools: tuple[str, ...] = ()
    may_end_early: bool = False


def steps(output: Path, left: float) -> list[Step]:
    kernels = ["tests/triton", "tests/device", "--ignore", "tests/triton/test_compiled.py"]
    parallel = ["-n", str(min(8, os.cpu_count() or 1))]

    def sanitized(tool: str, backend: str, most: float, *tools: str) -> Step:
        command = ["compute-sanitizer", "--error-exitcode", "9", "--tool", tool]
        tests = [*PYTEST, "-v", *SMALL, "-k", backend]
        return Step(f"{tool}-{backend}", [*command, *tests], most, (command[0], *tools), may_end_early=True)

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    return [
        Step("card", ["nvidia-smi"], 20, ("nvidia-smi",)),
        Step("build", [*pip, "install", "--no-build-isolation", "--no-deps", "-e", "."], 200),
        Step("info", [sys.executable, "-m", "effattn", "info"], 60),
        Step("cuda", [sys.executable, "-c", CUDA], 30, ("nvcc",)),
        Step("tests", [*PYTEST, *kernels, *parallel], 200),
        # The CUDA backend first: what Triton compiles while it runs takes most of the time.
        sanitized("memcheck", "cuda", 40, "nvcc"),
        sanitized("memcheck", "triton", 40),
        # Of shared memory: what passes through global memory is held together by barriers that it cannot see.
        sanitized("racecheck", "cuda", 30, "nvcc"),
        sanitized("racecheck", "triton", 25),
        Step(
            "benchmark",
            [*BENCHMARK, "--seconds", "{left}", "--output", str(output)],
            left,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=520, help="of all steps together")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ROOT / "build" / "gpu")))
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    missing = sorted(package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None)
    if missing:
        parser.error(f"this Python lacks {', '.join(missing)}")
    cuda = importlib.import_module("torch").cuda
    if not cuda.is_available():
        parser.error("torch sees no GPU")
    # One card's code is compiled in less time than all of it.
    major, minor = cuda.get_device_capability()
    os.environ["EFFATTN_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if major == 9 else "")
    begin, summary, failed = time.monotonic(), [], False
    for step in steps(output, arguments.seconds):
        left = arguments.seconds - (time.monotonic() - begin)
        absent = [tool for tool in step.tools if shutil.which(tool) is None]
        if absent:
            summary.append(f"{step.name:16} not run: there is no {' and no '.join(absent)} here")
            continue
        limit = min(step.most, left if step.name == "benchmark" else left - RESERVED)
        if limit < 5:
            summary.append(f"{step.name:16} not run: no time was left")
            failed = True
            continue
        result, seconds = run(step, limit, output)
        failed |= result.startswith("FAILED")
        summary.append(f"{step.name:16} {result} after {seconds:.0f} s")
    print("\n".join(["", *summary, f"logs, JSON and tables: {output}"]))
    return int(failed)


def run(step: Step, limit: float, output: Path) -> tuple[str, float]:
    """What became of it; what it said is kept, and its end is shown."""
    print(f"--- {step.name}", flush=True)
    log, begin = output / f"{step.name}.log", time.monotonic()
    # A case that has begun is finished: the benchmark is told to stop earlier than it would be stopped.
    command = [part.format(left=max(limit - 45, 5)) if part == "{left}" else part for part in step.command]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if step.may_end_early:  # the sanitizers: torch's cache would hide what lies between two of its tensors
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            result = "passed" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            result = "not finished" if step.may_end_early else "FAILED (out of time)"
            os.killpg(process.pid, signal.SIGKILL)  # with what it started, which would keep the card busy
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-(8 if result == "passed" else 40) :]), flush=True)
    return result, time.monotonic() - begin


if __name__ == "__main__":
    sys.exit(main())
