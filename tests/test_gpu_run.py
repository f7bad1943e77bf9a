"""A run on a GPU, rehearsed without one: the plan is the same, cases are tiny, and kernels fail in every way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiers import full

pytest.importorskip("triton")
pytest.importorskip("typer")

from benchmarks import environment, results
from benchmarks.gpu import cases, clock, lines, machine, names, plan, rehearsal, runner, smoke, staging, summary
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.lines import Status
from effattn import _library, verdicts
from effattn.backends import triton

ROOT = environment.ROOT
FILES = {"results.jsonl", "log.txt", "summary.md", "ncu.txt", "sanitizer.txt", "verdicts.json"}
TESTS = "benchmarks/gpu/rehearsed_tests.py::"
#: The operator whose kernels a rehearsal finds right.
(WORKS,) = rehearsal.SMOKE
#: What becomes of kernels that fail.
FAILS = {"crash": "crashed", "abort": "crashed", "hang": "timeout", "sticky": "error", "wrong": "wrong"}


RUN = """
import sys
from pathlib import Path
from benchmarks.gpu.plan import Run, Settings
output, seconds, *stages = sys.argv[1:]
Run(Settings(Path(output), float(seconds), stages, rounds=2, rehearsal=True)).run()
"""


def start(output, seconds, stages=(), **more):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--seconds", str(seconds), "--rounds", "2"]
    command += ["--output", str(output)]
    if stages:
        command = [sys.executable, "-c", RUN, str(output), str(seconds), *stages]
    told = {**os.environ, "EFFATTN_COMMIT": "0123456789abcdef", **more}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**told, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.full
def test_a_rehearsal(tmp_path):
    """All of it in one test: processes of pytest would each rehearse for themselves."""
    output = tmp_path / "run"
    process = start(output, 900)  # far more than it takes
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1, said  # something failed, as it should
    found = {(line["stage"], line["name"]): line for line in lines.latest(lines.read(output / plan.RESULTS))}
    check_what_every_line_says(found)
    check_smoke(found)
    check_cases(found)
    check_compiled(found)
    check_tests(found)
    check_files(output)
    check_verdicts(output)
    check_tables(output, tmp_path)


@pytest.mark.full
@pytest.mark.emulated
@pytest.mark.skipif(not _library.cuda_is_emulated, reason="runs on the emulated kernels, in make test-cuda")
def test_a_rehearsal_of_emulated_kernels(tmp_path, monkeypatch):
    """The CUDA backend alone serves what of it takes kernels, on the host."""
    output = tmp_path / "run"
    # A crash is the system's to tell, as it is where nothing is instrumented.
    options = f"{os.environ.get('ASAN_OPTIONS', '')}:handle_segv=0:handle_abort=0"
    stages = ("machine", "build", "smoke", "main", "cases")
    said, _ = start(output, 900, stages, ASAN_OPTIONS=options, TRITON_INTERPRET="0").communicate(timeout=600)
    found = {(line["stage"], line["name"]): line for line in lines.latest(lines.read(output / plan.RESULTS))}
    assert found["build", "backends"]["devices"] == {"cuda": "cpu"}, said
    assert found["smoke", "all kernels: triton"]["status"] == "skipped"
    check_what_every_line_says(found)
    check_smoke(found, "cuda")
    check_cases(found, "cuda")
    check_verdicts(output, "cuda")
    check_that_a_verdict_counts(output, monkeypatch)


def check_that_a_verdict_counts(output, monkeypatch):
    """Here, against the kernels that it was made of, if it has the name of an operator."""
    operator = cases.MEASURED[0].operator.name

    def why_not():
        verdicts._known.cache_clear()
        return verdicts.reason("cuda", operator, torch.device("cpu"), torch.bfloat16)

    (wrong,) = [v for v in verdicts.read(output / plan.VERDICTS) if v.operator == "wrong"]
    file = output / "verdicts of an operator.json"
    verdicts.write(file, [wrong._replace(operator=operator)])
    monkeypatch.setenv("EFFATTN_VERDICTS", str(file))
    assert f"failed when {operator} was tried on this GPU, forward in bfloat16: wrong" in why_not()
    monkeypatch.setenv("EFFATTN_VERDICTS", "")
    assert why_not() is None


def of_stage(found, stage):
    return {name: line["status"] for (of, name), line in found.items() if of == stage}


def check_what_every_line_says(found):
    for line in found.values():
        assert line["commit"] == "0123456789abcdef" and line["at"] >= 0 and line["status"] in list(Status)
        assert {"gpu", "driver", "versions", "sm_clock", "memory_clock"} <= set(line)
    later = [line for (stage, _), line in found.items() if stage != "machine"]
    assert {line["gpu"] for line in later} == {"rehearsal"} or {line["driver"] for line in later} != {"none"}
    assert all(line["versions"]["torch"] and line["versions"]["triton"] for line in later)


def check_smoke(found, backend="triton"):
    """A kernel that fails costs its line alone."""
    tried = of_stage(found, "smoke")
    assert {
        name.split(":")[0]: status for name, status in tried.items() if f": {backend}" in name and "all" not in name
    } == {
        **FAILS,
        WORKS: "ok",
    }
    assert found["smoke", f"{WORKS}: {backend}, bfloat16, backward, overlapped"]["status"] == "ok"
    line = found["smoke", f"wrong: {backend}, bfloat16, forward"]
    assert line["error"] > line["allowed_error"] > 0 and "relative error" in line["reason"]
    assert found["smoke", f"crash: {backend}, bfloat16, forward"]["reason"].startswith("SIGSEGV")


def check_cases(found, backend="triton"):
    """So does a way to compute a case."""
    for case in rehearsal.MAIN:
        rows = {name: line for (stage, name), line in found.items() if stage == "main" and name.startswith(case)}
        for name, line in rows.items():
            fails = ": crash," in name and ": effattn" in name
            assert line["status"] == ("crashed" if fails else "ok"), (name, line.get("reason"))
            if "row" in line:
                assert (line["row"]["milliseconds"] is None) is fails
                assert fails or len(line["row"]["samples"]) == 2
        assert any(f": effattn {backend}, graph" in name for name in rows) and any(
            "eager, calls" in name for name in rows
        )
    wrong = {name: status for name, status in of_stage(found, "cases").items() if ": effattn" in name}
    assert wrong and set(wrong.values()) == {"wrong"}


def check_compiled(found):
    compiled = of_stage(found, "compiled")
    assert len(compiled) == 4 and set(compiled.values()) == {"ok"}


def check_tests(found):
    """And a test."""
    assert of_stage(found, "tests") == {
        f"{TESTS}test_before": "ok",
        f"{TESTS}test_fault[crash]": "crashed",
        f"{TESTS}test_fault[abort]": "crashed",
        f"{TESTS}test_fault[hang]": "timeout",
        f"{TESTS}test_fault[sticky]": "error",
        f"{TESTS}test_wrong": "wrong",
        f"{TESTS}test_after": "ok",
    }
    assert "a wrong result" in found["tests", f"{TESTS}test_wrong"]["reason"]


def check_files(output):
    assert {path.name for path in output.iterdir()} <= FILES
    log = (output / plan.LOG).read_text()
    assert "=== crash: triton, bfloat16, forward: crashed" in log and "Fatal Python error: Segmentation fault" in log
    summary = (output / plan.SUMMARY).read_text()
    assert "## Failed" in summary and "hang: triton, bfloat16, forward: timeout" in summary
    assert "| effattn triton" in summary and "commit 0123456" in summary


def check_verdicts(output, backend="triton"):
    """They name what failed as the registry asks for it."""
    found = verdicts.read(output / plan.VERDICTS)
    assert {v.operator: v.status for v in found} == FAILS
    assert {(v.backend, v.dtype, v.direction) for v in found} == {(backend, "bfloat16", "forward")}
    assert {v.commit for v in found} == {"0123456789abcdef"} and all(len(v.identity) == 16 for v in found)


def check_tables(output, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gpu_report.README_BEGIN}\nold\n{gpu_report.README_END}\nafter\n")
    written = gpu_report.write(output / plan.RESULTS, tmp_path / "results", readme)
    data = results.read(written[0])
    assert "-0123456-" in written[0].name and written[0].name.endswith("-short.json")
    assert set(data["suites"]) == set(rehearsal.SUITES)
    tables = written[1].read_text()
    assert (
        "effattn triton: crashed: SIGSEGV" in tables and "- smoke, hang: triton, bfloat16, forward: timeout" in tables
    )
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    with pytest.raises(ValueError, match=r"expected lines of a run on a GPU, got .* of a rehearsal"):
        gpu_report.write(output / plan.RESULTS, tmp_path / "results", ROOT / "README.md")
    (tiny,) = [line for line in text.splitlines() if "tiny, bfloat16" in line]
    assert "linear attention" in tiny and "effattn" in tiny and ", slower" in tiny  # interpreted


@pytest.mark.full
def test_a_run_that_is_killed_leaves_what_it_knew(tmp_path):
    """While a kernel hangs: lines that can be read, a summary, and no process."""
    process = start(tmp_path, 900, EFFATTN_RUN_OUTPUT=str(tmp_path))
    begin = time.monotonic()
    log = tmp_path / plan.LOG
    while not (log.exists() and "=== hang" in log.read_text()):
        assert process.poll() is None and time.monotonic() - begin < 120
        time.sleep(0.1)
    time.sleep(2)  # the summary may be a second late
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = lines.read(tmp_path / plan.RESULTS)
    assert {"machine", "build", "smoke"} == {line["stage"] for line in found}
    summary = (tmp_path / plan.SUMMARY).read_text()
    assert summary.startswith("# GPU run") and "smoke, crash: triton, bfloat16, forward: crashed" in summary
    assert any(v.operator == "crash" for v in verdicts.read(tmp_path / plan.VERDICTS))
    assert {path.name for path in tmp_path.iterdir()} <= FILES
    for _ in range(600):  # one that imports torch finds out when it has
        if not processes_told_of(tmp_path):
            return
        time.sleep(0.1)
    raise AssertionError("its processes still run")


def processes_told_of(output):
    """Those that have inherited the folder's name from the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            told = path.read_bytes()
        except OSError:
            continue
        if f"EFFATTN_RUN_OUTPUT={output}".encode() in told.split(b"\0"):
            found.append(path)
    return found


@pytest.mark.parametrize("seconds", [3, 14])
def test_a_run_ends_in_time(tmp_path, seconds):
    begin = time.monotonic()
    process = start(tmp_path, seconds)
    process.communicate(timeout=60)
    assert time.monotonic() - begin < seconds + 2  # and what Python itself takes to start
    found = lines.read(tmp_path / plan.RESULTS)
    assert found and any(line["status"] == Status.NOT_RUN for line in found)
    assert (tmp_path / plan.SUMMARY).read_text().startswith("# GPU run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--seconds", "60", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    found = lines.latest(lines.read(tmp_path / plan.RESULTS))
    assert {(line["stage"], line["name"]): line["status"] for line in found} == {
        ("machine", "run"): "ok",
        ("machine", "machine"): "ok",
        ("machine", "gpu"): "error",
        ("build", "build"): "not run",
    }
    assert "torch sees no GPU" in done.stdout


# --- without a process --------------------------------------------------------------------------------


def test_the_budgets_of_a_visit():
    """All stages have their time, and a last one what is left."""
    assert sum(budget.seconds for budget in plan.BUDGETS.values()) <= plan.VISIT_SECONDS - plan.RESERVE
    order = ["machine", "build", "smoke", "main", "compiled", "tests", "profile", "memcheck", "cases"]
    assert list(plan.BUDGETS) == order and set(plan.MEASURING) < set(order)


def test_what_memory_is_checked_of(tmp_path, monkeypatch):
    """CUDA's kernels and none of torch's."""
    run, ran = plan.Run(plan.Settings(tmp_path, rehearsal=True)), []
    run.sensors.close()
    run.machine, run.backends = {"tools": ["compute-sanitizer"]}, {"unavailable": {}}
    monkeypatch.setattr(run, "_run", ran.extend)
    run.check_memory()
    (job,) = ran
    at = job.command.index("--kernel-regex")
    assert job.command[0] == "compute-sanitizer" and job.command[at + 1] == "kns=effattn"
    source = (ROOT / "kernels" / "cuda" / "core" / "reduction.cu").read_text()
    assert "namespace effattn::cuda" in source, "so mangled names have it"
    assert plan.BUDGETS["memcheck"].seconds >= 40


def test_names_of_cases_are_those_that_there_are():
    known = {cases.name_of(case) for name, (_, make) in cases.SUITES.items() for case in make()}
    assert set(cases.MAIN) <= known and len(cases.MAIN) == 7 and set(cases.PROFILED) <= set(cases.MAIN)
    assert set(cases.SUITES) == {*cases.OPERATOR_OF, cases.MODELS} == set(cases.README_TITLES)


def test_every_operator_with_kernels_is_tried_and_has_tests_of_its_own():
    """Some of which run under compute-sanitizer."""
    operators = {measured.operator.name for measured in cases.MEASURED}
    assert operators == set(triton.LAUNCHERS)
    files = {path.stem.removeprefix("test_"): path for path in (ROOT / "tests" / "device").glob("test_*.py")}
    for operator in operators:
        (file,) = (path for stem, path in files.items() if operator.startswith(stem))
        assert "pytest.mark.memcheck" in file.read_text(), file


def test_which_kernel_a_case_takes():
    operators = {"gpu-one": "one", "gpu-one-training": "one"}
    assert str(names.kernel_of("gpu-one-training: a, b, float16", "cuda", operators)) == "one: cuda, float16, backward"
    assert str(names.kernel_of("gpu-one: a: b, bfloat16", "triton", operators)) == "one: triton, bfloat16, forward"
    assert names.kernel_of("gpu-models: efficientvit_b1 @224, batch 1, float16", "cuda", operators) is None
    assert names.operator_of(names.Kernel("one with two", "cuda", "float16", "forward")) == "one"


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ({"building": True}, ["building", "backends"]),
        ({"building": False, "building without CUDA": True}, ["building", "building without CUDA", "backends"]),
        ({"building": True, "backends": [False, True]}, ["building", "backends", "backends"]),
    ],
    ids=["built", "no CUDA", "asked twice"],
)
def test_a_build_that_fails_is_not_the_end(tmp_path, monkeypatch, outcomes, expected):
    """Without CUDA's kernels, Triton's and the peers are still measured."""
    run = plan.Run(plan.Settings(tmp_path, seconds=520))
    run.stage, run.until, ran = "build", time.monotonic() + 200, []
    run.machine = {"gpu": "NVIDIA H200", "capability": "9.0", "tools": ["nvcc"]}
    answers = list(outcomes.get("backends", [True]))

    def told(all_jobs, until, heard, *rest, **more):
        (job,) = all_jobs
        ran.append(job.name)
        if job.name == "backends":
            figures = {"identities": {}, "cases": [], "devices": {}}
            heard("backends", Status.OK if answers.pop(0) else Status.TIMEOUT, figures)
        else:
            assert job.environment["EFFATTN_CUDA"] == ("1" if job.name == "building" else "0")
            assert job.environment["EFFATTN_CUDA_ARCHS"] == "90a" and job.limit <= 200
            built = {"built": "everything"} if outcomes[job.name] else {"reason": "nvcc: error"}
            heard("build", Status.OK if outcomes[job.name] else Status.ERROR, built)

    monkeypatch.setattr(plan.jobs, "run", told)
    run.build()
    assert ran == expected and run.backends
    run.sensors.close()


def test_what_was_slow_is_tried_again_and_what_was_wrong_is_not(tmp_path, monkeypatch):
    run = plan.Run(plan.Settings(tmp_path, rehearsal=True))
    run.stage, run.until = "smoke", time.monotonic() + 100
    run.backends = {
        **{
            "devices": {"triton": "cpu"},
            "cases": [],
            "smoke": [WORKS],
            "unavailable": {},
            "verdicts_of": ["gpu", "driver"],
        },
        "identities": {"triton": "0" * 16},
    }
    first = {"hang": Status.TIMEOUT, "wrong": Status.WRONG, "crash": Status.CRASHED, "sticky": Status.ERROR}
    again = []

    def told(all_jobs, until, heard, *rest, **more):
        for job in all_jobs:
            name = job.name.split(":")[0]
            if job.name.endswith(names.AGAIN):
                again.append(name)
                assert job.command[-1] == names.AGAIN
                heard(job.name, Status.OK if name == "hang" else Status.ERROR, {"reason": None})
            else:
                heard(job.name, first.get(name, Status.OK), {"reason": "so"})

    monkeypatch.setattr(plan.jobs, "run", told)
    run.smoke()
    assert sorted(again) == ["hang", "sticky"]
    assert {k.operator for k in run.quarantine} == {"wrong", "crash", "sticky"}
    assert {v.operator for v in verdicts.read(tmp_path / plan.VERDICTS)} == {"wrong", "crash", "sticky"}
    run.sensors.close()


def test_launches_of_one_kernel_overlap(tmp_path, monkeypatch):
    """It is quarantined if it fails in either way, whichever is done last."""
    run = plan.Run(plan.Settings(tmp_path, rehearsal=True))
    run.stage, run.until = "smoke", time.monotonic() + 100
    run.backends = {
        **{
            "devices": {"cuda": "cpu"},
            "cases": [],
            "smoke": [WORKS],
            "unavailable": {},
            "verdicts_of": ["gpu", "driver"],
        },
        "identities": {"cuda": "0" * 16},
    }
    works, blocking = f"{WORKS}: cuda, bfloat16, backward", {}

    def told(all_jobs, until, heard, *rest, **more):
        blocking.update({job.name: job.environment["CUDA_LAUNCH_BLOCKING"] for job in all_jobs})
        for name in (f"{works}{names.OVERLAPPED}", works):
            heard(name, Status.OK if name == works else Status.WRONG, {"reason": None})

    monkeypatch.setattr(plan.jobs, "run", told)
    run.smoke()
    run.sensors.close()
    assert [name for name, waits in blocking.items() if waits != "1"] == [f"{works}{names.OVERLAPPED}"]
    assert [str(kernel) for kernel in run.quarantine] == [works]
    assert [v.operator for v in verdicts.read(tmp_path / plan.VERDICTS)] == [WORKS]


@pytest.mark.parametrize(
    ("replay", "status", "text"),
    [
        (lambda results: results, "ok", None),
        (lambda results: [2 * t for t in results], "wrong", runner.OTHER_BITS),
        (None, "ok", "operation not permitted when stream is capturing"),
    ],
    ids=["same", "other", "impossible"],
)
def test_what_a_graph_replays_has_the_same_bits(monkeypatch, replay, status, text):
    def replayed(self, call):
        if replay is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return replay(call())

    monkeypatch.setattr(clock.WallClock, "replayed", replayed)
    monkeypatch.setattr(smoke, "device_of", lambda backend: torch.device("cpu"))
    monkeypatch.setenv(rehearsal.VARIABLE, "1")
    for direction in names.DIRECTIONS:
        found = smoke.check(names.Kernel(WORKS, "reference", "float32", direction))
        assert found["status"] == status and (text is None or text in str(found)), found


def test_a_case_whose_graph_gives_other_bits_is_not_timed(monkeypatch):
    monkeypatch.setattr(clock.WallClock, "replayed", lambda self, call: [-t for t in call()])
    watch = SimpleNamespace(begin=lambda *_: None, finish=lambda *_, **__: None)
    case = rehearsal.tiny()
    rows = runner.measure(case, runner.plain_ways(case, ["reference"]), clock.WallClock(), 1, watch)
    assert {(row.candidate, row.variant) for row in rows if row.reason} == {("effattn reference", "graph")}
    assert next(row.reason for row in rows if row.reason) == f"wrong: {runner.OTHER_BITS}"


def test_libraries_that_end_the_process_are_left_alone(tmp_path, monkeypatch):
    """The next process does not load them again, and builds."""
    staged = []
    builder = staging.native()
    monkeypatch.setattr(builder, "stage", lambda target, folder, prebuilt: staged.append(prebuilt))
    monkeypatch.setattr(builder.Target, "native", classmethod(lambda cls: None))
    monkeypatch.setattr(staging, "native", lambda: builder)
    monkeypatch.setattr(staging.child, "start", lambda: {staging.PREBUILT})
    monkeypatch.setattr(staging, "why_not", lambda *_: pytest.fail("loaded again"))
    monkeypatch.setattr(sys, "argv", ["staging", str(tmp_path)])
    staging.main()
    assert staged == [None]


def test_a_quarantined_kernel_is_not_measured(tmp_path, monkeypatch):
    """Its case is measured with the other backend, and a line says why."""
    run = plan.Run(plan.Settings(tmp_path, rehearsal=True))
    run.stage = "main"
    case = cases.MAIN[0]
    run.backends = {"devices": {"cuda": "cuda", "triton": "cuda"}, "cases": [case], "operators": cases.OPERATOR_OF}
    run.quarantine[names.kernel_of(case, "cuda", cases.OPERATOR_OF)] = {"status": "crashed", "reason": ""}
    ran = []
    monkeypatch.setattr(plan.jobs, "run", lambda all_jobs, *rest: ran.extend(all_jobs))
    run._measure([case], "plain")
    (line,) = run.writer.lines
    assert line["status"] == "skipped" and line["name"] == f"{case}: effattn cuda" and "quarantined" in line["reason"]
    assert [job.environment["EFFATTN_MEASURED_BACKENDS"] for job in ran] == ["triton"]
    run.sensors.close()


@pytest.fixture
def pretended(monkeypatch):
    """A GPU's clock without a GPU, and what was asked of the GPU, in turn."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            said.append("event")
            self.at = len(said)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    facts = SimpleNamespace(L2_cache_size=50 << 20, total_memory=100 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    monkeypatch.setattr(torch, "zeros", lambda size, **_: SimpleNamespace(amax=lambda: said.append(4 * size)))
    return clock.CudaClock(), said


def test_a_cache_that_inputs_do_not_fill_is_cleared(pretended):
    """Before each pass over them, outside of its time; calls are not issued while it is."""
    gpu, said = pretended

    def call():
        said.append("call")

    small, large = 64 * (1 << 20), 160 << 20
    assert gpu.clearing(large, is_graph=True) is None and gpu.sets(1 << 20) == 64
    assert gpu.seconds(call, 3) == pytest.approx(4e-3) and said == ["event", "call", "call", "call", "event"]
    for is_graph, clear in ((True, [150 << 20]), (False, [150 << 20, "wait"])):
        said.clear()
        assert gpu.seconds(call, 2, gpu.clearing(small, is_graph)) == pytest.approx(4e-3)
        assert said == [*clear, "event", "call", "event"] * 2


def test_clocks_are_up_before_calls_are_counted(pretended, monkeypatch):
    gpu, said = pretended
    monkeypatch.setattr(runner, "WARM_SECONDS", 0.005)
    runner._warm(lambda: said.append("call"), gpu)
    assert said[:6] == ["event", "call", "event"] * 2


def test_a_capture_that_fails_is_in_the_summary():
    """And is no fault of the kernel, whatever the GPU says afterwards."""
    told = smoke._replays(SimpleNamespace(replayed=fails), [(None, None, None)])
    assert told == {"not_captured": "RuntimeError: operation not permitted when stream is capturing"}
    line = {"stage": "smoke", "name": "a kernel", "status": "ok", "gpu": "a GPU", "driver": "1", "commit": "abc"}
    assert "smoke, a kernel: ok: RuntimeError: operation not" in summary.of([{**line, "versions": {}, **told}], [], 1)


def fails(call):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_samples_are_of_a_cold_cache(monkeypatch):
    """The inputs' bytes, all sets together, decide."""
    wall, sizes = clock.WallClock(), []
    monkeypatch.setattr(wall, "clearing", lambda size, is_graph: sizes.append((size, is_graph)))
    case = rehearsal.tiny()
    ways = runner.plain_ways(case, [])
    runner.measure(case, ways, wall, 1, SimpleNamespace(begin=lambda *_: None, finish=lambda *_, **__: None))
    one = sum(t.nbytes for t in case.make())
    assert sizes == [(2 * one, way.graph) for way in ways]


def test_nothing_is_timed_beside_a_compiler(monkeypatch):
    """Whatever is computed is computed in a turn, and samples are taken alone."""
    now, seen = [], set()

    def turn(name):
        @contextlib.contextmanager
        def held():
            assert not now, "one in another would wait for itself"
            now.append(name)
            yield
            now.pop()

        return held

    def compiled(function, mode):
        return lambda *arguments: (seen.add((*now, "computes")), function(*arguments))[1]

    def seconds(call, repeats, before=None):
        seen.add((*now, "is timed"))
        return 1.0

    for name in ("preparing", "alone"):
        monkeypatch.setattr(runner.turns, name, turn(name))
    monkeypatch.setattr(runner.peers, "compiled", compiled)
    wall, case = clock.WallClock(), rehearsal.tiny()
    monkeypatch.setattr(wall, "seconds", seconds)
    monkeypatch.setattr(wall, "captured", lambda calls: lambda: None)
    ways = runner.compiled_ways(case, runner.QUICK_MODES)
    rows = runner.measure(case, ways, wall, 3, SimpleNamespace(begin=lambda *_: None, finish=lambda *_, **__: None))
    assert all(len(row.samples) == 3 for row in rows)
    assert seen == {("preparing", "computes"), ("alone", "is timed")}


def test_compilers_keep_to_their_process(tmp_path, monkeypatch):
    """No workers go on outside of its turn, and none starts, and imports torch, while others are timed."""
    run, ran = plan.Run(plan.Settings(tmp_path, seconds=520)), []
    run.sensors.close()
    run.stage, run.backends = "compiled", {"devices": {}, "main": cases.MAIN}
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(plan.jobs, "run", lambda all_jobs, until, heard, log, at_once: ran.append((all_jobs, at_once)))
    run.measure_compiled()
    ((all_jobs, at_once),) = ran
    assert at_once >= len(all_jobs) == len(cases.MAIN)
    assert {job.environment["TORCHINDUCTOR_COMPILE_THREADS"] for job in all_jobs} == {"1"}


@pytest.mark.parametrize(("status", "dirty"), [(None, None), ("", False), (" M a.py", True)])
def test_whether_the_sources_are_changed(monkeypatch, status, dirty):
    """Nobody knows where there is no git."""
    monkeypatch.setattr(machine.environment, "git", lambda *_: status)
    assert machine.facts()["dirty"] is dirty


def test_commits(monkeypatch):
    monkeypatch.setenv("EFFATTN_COMMIT", "told")
    assert plan.commit() == "told"
    monkeypatch.delenv("EFFATTN_COMMIT")
    monkeypatch.setattr(plan.environment, "ROOT", Path("/"))
    assert plan.commit() == "unknown"


def test_a_run_without_figures_leaves_the_readme_alone(tmp_path):
    source = tmp_path / "results.jsonl"
    line = {"stage": "machine", "name": "gpu", "status": "error", "gpu": "unknown", "driver": "none", "commit": "c"}
    source.write_text(json.dumps({**line, "versions": {}, "sm_clock": None}) + "\n")
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    with pytest.raises(ValueError, match=r"expected lines of a run that measured something, got .*results\.jsonl"):
        gpu_report.write(source, tmp_path, readme)
    assert readme.read_text() == (ROOT / "README.md").read_text()
    source.write_text("")
    with pytest.raises(ValueError, match="expected lines of a run on a GPU, got none"):
        gpu_report.write(source, tmp_path, readme)


# --- libraries that were brought along ------------------------------------------------------------------

REAL = _library.library_path
#: Pretends to compile: what it should write is there, and empty.
COMPILER = """#!/bin/sh
case "$*" in
  *--version*) echo "a compiler, release 13.0, of a test"; exit ;;
  *--list-gpu-code*) echo "sm_80 sm_90"; exit ;;
esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


def make_library(path, of_cuda, of_cpu="", more=""):
    """One that says this of itself, and does nothing else."""
    source = path.with_suffix(".c")
    functions = {"effattn_cuda_build": of_cuda, "effattn_build": of_cpu, "effattn_kernels_build": of_cpu}
    texts = [f'const char* {name}(void) {{ return "{told}"; }}' for name, told in functions.items()]
    source.write_text("\n".join([*texts, more, ""]))
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)


@pytest.fixture
def libraries(tmp_path):
    """Makes libraries that say of themselves what they are told."""
    fits = f"g++ 12; {staging.native().cpu_digest('g++ 12')}"

    def make(of_cuda, of_cpu=fits):
        folder = tmp_path / f"libraries {len(list(tmp_path.iterdir()))}"  # of one path, one is loaded
        folder.mkdir()
        for name in ("libeffattn.so", "libeffattn_kernels.so", "libeffattn_cuda.so"):
            make_library(folder / name, of_cuda, of_cpu)
        return folder

    return make


def test_which_libraries_are_taken(libraries, tmp_path):
    builder = staging.native()
    digest = builder.cuda_digest("nvcc 13.0")
    assert staging.why_not(libraries(f"nvcc 13.0; 80 90a; {digest}"), builder, "90a") is None
    assert (
        staging.why_not(libraries(f"nvcc 13.0; 80; {digest}"), builder, "90a")
        == "they are compiled for 80, not for 90a"
    )
    assert "made of other sources (0000)" in staging.why_not(libraries("nvcc 13.0; 90a; 0000"), builder, "90a")
    assert "made of other sources (no digest)" in staging.why_not(libraries("nvcc 13.0; 90a"), builder, "90a")
    of_cuda = f"nvcc 13.0; 90a; {digest}"
    assert "made of other sources (0000)" in staging.why_not(libraries(of_cuda, "g++ 12; 0000"), builder, "90a")
    assert "made of other sources (no digest)" in staging.why_not(libraries(of_cuda, ""), builder, "90a")
    assert staging.why_not(tmp_path, builder, "90a") == (
        "there is no libeffattn.so and no libeffattn_kernels.so and no libeffattn_cuda.so"
    )
    broken = libraries("")
    (broken / "libeffattn_cuda.so").write_text("none")
    assert "libeffattn_cuda.so" in staging.why_not(broken, builder, "90a")


def what_fits(tree):
    """What a CUDA library says that is made of these sources, for a GPU of 9.0."""
    builder = staging.native()
    builder.ROOT = tree
    return f"nvcc 13.0; 90a; {builder.cuda_digest('nvcc 13.0')}"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the sources, with libraries for a GPU of 9.0 that fit, and compilers that pretend."""
    tree = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("benchmarks", "csrc", "effattn", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for library in (REAL, REAL.with_name("libeffattn_kernels.so"), REAL.with_name("libeffattn_onnxruntime.so")):
        shutil.copy(library, tree / "effattn")
    make_library(tree / "effattn" / "libeffattn_cuda.so", what_fits(tree))
    for path in (tree / "bin" / "nvcc", tree / "bin" / "g++"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMPILER)
        path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tree))
    monkeypatch.setenv("EFFATTN_COMPILER_LAUNCHER", "")
    monkeypatch.setenv("CXX", str(tree / "bin" / "g++"))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(plan.jobs, "ROOT", tree)
    monkeypatch.setattr(plan, "STAGE", tree / "stage")
    return tree


def fits(tree):
    return None, "_C"


def is_cut_off(tree):
    """In its middle: the loader refuses it, or dies of it."""
    library = tree / "effattn" / REAL.name
    library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])
    return ("skipped", "crashed"), "everything"


def is_of_other_sources(tree):
    (tree / "kernels" / "params" / "image.h").write_text("// changed\n")
    return ("skipped",), "everything"


def ends_the_process(tree):
    more = "__attribute__((constructor)) void begin(void) { *(volatile int*)0 = 1; }"
    make_library(tree / "effattn" / "libeffattn_cuda.so", what_fits(tree), more=more)
    return ("crashed",), "everything"


def does_not_fit_and_cannot_be_built(tree):
    is_of_other_sources(tree)
    (tree / "bin" / "nvcc").write_text(COMPILER.replace("while", "exit 1; while"))
    return ("skipped",), "everything but CUDA"


@pytest.mark.parametrize(
    "given",
    [fits, full(is_cut_off), is_of_other_sources, full(ends_the_process), full(does_not_fit_and_cannot_be_built)],
)
def test_what_becomes_of_libraries(checkout, monkeypatch, given):
    """They are taken, or all is built, or all but CUDA's kernels."""
    refused, built = given(checkout)
    run = plan.Run(plan.Settings(checkout / "output", seconds=520))
    run.stage, run.until = "build", time.monotonic() + 200
    run.machine = {"gpu": "NVIDIA H200", "capability": "9.0", "tools": ["nvcc"]}
    asked = []
    monkeypatch.setattr(run, "_ask_backends", lambda: asked.append(run.backends.update(devices={})))
    run.build()
    run.sensors.close()
    lines_of = [(line["name"], str(line["status"])) for line in run.writer.lines]
    assert asked == [None] and lines_of[-1] == (staging.BUILD, "ok"), (checkout / "output" / plan.LOG).read_text()
    first = next(status for name, status in lines_of if name == staging.PREBUILT)
    assert first == "ok" if refused is None else first in refused
    objects = {path.name for path in (checkout / "stage" / "objects").glob("*.o")}
    has_cuda = (checkout / "stage" / "effattn" / "libeffattn_cuda.so").exists()
    assert has_cuda is (built != "everything but CUDA")
    assert ("csrc_python_python.cpp.o" in objects) and ("kernels_cpu_core_isa.cpp.o" in objects) is (built != "_C")
    assert ((checkout / "stage" / "effattn" / REAL.name).stat().st_size == REAL.stat().st_size) is (built == "_C")
