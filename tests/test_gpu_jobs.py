"""How a run on a GPU starts processes: a crash, a hang or an error costs its own line, and nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.gpu import child, jobs, lines, names, turns
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.lines import Status

PRELUDE = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from benchmarks.gpu import child
done = child.start()
def steps(**named):
    child.plan([name for name in named if name not in done])
    for name, step in named.items():
        if name not in done:
            child.begin(name, figure=7)
            step()
            child.finish(name, "ok")
ok = lambda: None
"""
CRASH = "lambda: os.kill(os.getpid(), 11)"
HANG = "lambda: time.sleep(100)"
STICKY = "lambda: (child.finish('b', 'error', reason='illegal memory access'), os._exit(child.STICKY))"


@pytest.fixture
def run(tmp_path):
    """Runs jobs of Python code, and returns what was heard: by name, (status, reason, figures)."""

    def start(*codes, seconds=60.0, at_once=1, **options):
        all_jobs = [
            Job(f"job {i}", [sys.executable, "-c", PRELUDE + code], **{"limit": 20, "least": 0.1, **options})
            for i, code in enumerate(codes)
        ]
        heard: list[tuple[str, str, dict]] = []
        until = time.monotonic() + seconds
        jobs.run(all_jobs, until, lambda *what: heard.append(what), jobs.Log(tmp_path / "log.txt"), at_once)
        assert not jobs.running
        return heard

    return start


def statuses(heard):
    return [(name, str(status)) for name, status, _ in heard]


def test_a_command_has_a_line(run, tmp_path):
    assert statuses(run("print('said')", "sys.exit(3)")) == [("job 0", "ok"), ("job 1", "error")]
    log = (tmp_path / "log.txt").read_text()
    assert "job 0 | said\n" in log and "=== job 1: error, status 3" in log


@pytest.mark.parametrize(("fault", "status"), [(CRASH, "crashed"), (HANG, "timeout"), (STICKY, "error")])
def test_a_fault_costs_its_own_line_alone(run, fault, status):
    heard = run(f"steps(a=ok, b={fault}, c=ok, d={CRASH}, e=ok)", item_limit=1.0, line=False)
    assert statuses(heard) == [("a", "ok"), ("b", status), ("c", "ok"), ("d", "crashed"), ("e", "ok")]
    if status != "error":
        assert heard[1][2]["figure"] == 7, "what it said when it began"


def test_a_hang_of_a_process_that_says_nothing(run):
    ((name, status, figures),) = run("time.sleep(100)", limit=1.0)
    assert (name, status) == ("job 0", Status.TIMEOUT) and "did not end within 1 s" in figures["reason"]


def test_what_there_is_no_time_for_is_said(run):
    start = time.monotonic()
    heard = run(f"steps(a=ok, b={HANG}, c=ok)", "ok()", seconds=3.0)
    assert time.monotonic() - start < 5
    assert statuses(heard) == [("a", "ok"), ("b", "not run"), ("c", "not run"), ("job 1", "not run")]
    assert heard[1][2]["reason"] == "ended when no time was left" and heard[3][2]["reason"] == "no time was left"


def test_what_is_known_provisionally_is_kept(run):
    """Unless it crashes: then that counts."""
    code = """
child.plan(['a', 'b', 'c'])
for name in 'ab':
    child.begin(name)
    child.finish(name, 'ok', provisional=True)
child.begin('a')
"""
    heard = run(code + "time.sleep(100)", seconds=3.0)
    assert statuses(heard) == [("a", "ok"), ("b", "ok"), ("c", "not run")]
    heard = run(code + "os.abort()", seconds=5.0)
    assert statuses(heard)[:3] == [("a", "ok"), ("b", "ok"), ("a", "crashed")]


def test_a_process_that_cannot_start_its_work_is_not_started_again(run):
    heard = run("child.plan(['a', 'b']); sys.exit('no such module')")
    assert statuses(heard) == [("a", "not run"), ("b", "not run"), ("job 0", "error")]
    assert "no such module" in heard[2][2]["reason"]


def test_several_at_once(run):
    start = time.monotonic()
    heard = run(*["time.sleep(1)"] * 4, at_once=4)
    assert statuses(heard) == [(name, "ok") for name, *_ in heard] and len(heard) == 4
    assert time.monotonic() - start < 3.5


def test_what_a_process_leaves_behind_is_ended(run, tmp_path):
    """Its children too, which would keep the GPU busy."""
    code = "import subprocess; p = subprocess.Popen(['sleep', '300'])"
    run(f"{code}; open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(300)", limit=2.0)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


def test_children_end_with_their_parent(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from benchmarks.gpu import jobs;"
        "job = jobs.Job('child', [sys.executable, '-c', sys.argv[1]], limit=100);"
        "jobs.run([job], time.monotonic() + 100, print, jobs.Log(Path(sys.argv[2])))"
    )
    told = tmp_path / "pid"
    inner = f"{PRELUDE}\nopen({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    parent = subprocess.Popen([sys.executable, "-c", code, inner, str(tmp_path / "log.txt")], cwd=jobs.ROOT)
    while not (told.exists() and told.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    pid = int(told.read_text())
    assert alive(pid)
    parent.kill()
    parent.wait()
    for _ in range(50):
        if not alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError("it outlived its parent")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_job_that_says_too_much(run, tmp_path):
    """Keeps its beginning and how it ended, and leaves room for the others."""
    run("print('first'); [print('x' * 1000) for _ in range(1000)]; sys.exit(3)", "print('other')")
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 1.2 * jobs.MOST_OF_JOB and log.count("the rest is not kept") == 1
    for text in ("job 0 | first\n", "=== job 0: error, status 3", "job 1 | other\n"):
        assert text in log


def test_output_beside_the_log(run, tmp_path):
    run("print('of its own')", output=tmp_path / "other.txt")
    assert "of its own\n" in (tmp_path / "other.txt").read_text().splitlines(keepends=True)
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize(
    ("text", "sticky"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("effattn: launch of a kernel: unspecified launch failure, of ...", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA out of memory. Tried to allocate 20.00 GiB", False),
        ("q: expected a tensor", False),
    ],
)
def test_which_errors_are_sticky(text, sticky):
    assert child.is_sticky(RuntimeError(text)) is sticky


# --- turns ------------------------------------------------------------------------------------------------

TURNS = """
import time
from benchmarks.gpu import turns
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.05)
def during(kind, seconds, tell=os.devnull):
    with kind():
        open(tell, "w").close()
        begin = time.monotonic()
        time.sleep(seconds)
        print(kind.__name__, begin, time.monotonic())
"""


KINDS = ("preparing", "alone")


def overlap(a, b):
    return a[1] < b[2] and b[1] < a[2]


def test_who_is_timed_is_alone(run, tmp_path):
    """Whatever others prepare, which they do side by side, and however long a turn is waited for."""
    told = {"EFFATTN_GPU_LOCK": str(tmp_path / "lock")}
    code = TURNS + "steps(a=lambda: [during(k, 0.4) for k in [turns.preparing, turns.alone] * 3])"
    heard = run(*[code] * 3, at_once=3, environment=told, item_limit=4.0, line=False)
    assert statuses(heard) == [("a", "ok")] * 3, "2.4 s are its own, the others' turns are not"
    said = [line.partition(" | ")[2].split(" ") for line in (tmp_path / "log.txt").read_text().splitlines()]
    taken = [(kind, float(begin), float(end)) for kind, begin, end in (of for of in said if of[0] in KINDS)]
    assert len(taken) == 18
    pairs = [{a[0], b[0]} for i, a in enumerate(taken) for b in taken[:i] if overlap(a, b)]
    assert pairs and all(pair == {"preparing"} for pair in pairs)


def test_who_waits_to_be_timed_goes_before_who_would_begin(tmp_path, monkeypatch):
    monkeypatch.setenv(names.GPU_LOCK, str(tmp_path / "lock"))
    order = []

    def take(kind):
        with kind():
            order.append(kind.__name__)

    threads = [threading.Thread(target=take, args=[kind]) for kind in (turns.alone, turns.preparing)]
    with turns.preparing():
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        assert order == [], "the one waits for what has begun, the other for the one"
    for thread in threads:
        thread.join()
    assert order == ["alone", "preparing"]


def test_a_hang_in_a_turn_is_ended(run, tmp_path):
    """By its own limit, and then it is the next one's turn, which may be heard of first."""
    told, held = {"EFFATTN_GPU_LOCK": str(tmp_path / "lock")}, str(tmp_path / "held")
    first = f"steps(a=lambda: during(turns.alone, 100, {held!r}))"
    second = f"wait_for({held!r}); steps(b=lambda: during(turns.alone, 0))"
    heard = run(TURNS + first, TURNS + second, at_once=2, environment=told, item_limit=2.0, line=False)
    assert sorted(statuses(heard)) == [("a", "timeout"), ("b", "ok")]


# --- tests ------------------------------------------------------------------------------------------------

TESTS = """
import pytest
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("i", range(3))
def test_both(backend, i):
    assert i < 2
def test_none():
    pytest.skip("for a reason")
"""


@pytest.fixture
def tested(tmp_path):
    """Runs tests of a file by the plugin; name and status of each."""
    file = tmp_path / "test_an_operator.py"
    file.write_text(TESTS)

    def run(**told):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_plugin"]
        environment = {"PYTHONPATH": str(jobs.ROOT), **told}
        job = Job("tests", [*command, "--rootdir", str(tmp_path), str(file)], 60, environment=environment, line=False)
        heard = []
        jobs.run([job], time.monotonic() + 60, lambda *what: heard.append(what), jobs.Log(tmp_path / "log.txt"))
        return {name.rpartition("::")[2]: (str(status), figures.get("reason")) for name, status, figures in heard}

    return run


def test_tests_of_a_backend(tested):
    found = tested(EFFATTN_TESTED_BACKEND="cuda")
    assert set(found) == {*(f"test_both[{i}-cuda]" for i in range(3)), "test_none"}, "those of none are the first one's"
    assert [found[f"test_both[{i}-cuda]"][0] for i in range(3)] == ["ok", "ok", "wrong"]
    assert found["test_none"] == ("skipped", "Skipped: for a reason")
    assert set(tested(EFFATTN_TESTED_BACKEND="triton")) == {f"test_both[{i}-triton]" for i in range(3)}


def test_shards_have_each_test_once(tested):
    shards = [tested(EFFATTN_TEST_SHARD=f"{i}/3") for i in range(3)]
    assert sum(map(len, shards)) == len({name for shard in shards for name in shard}) == 7


def test_tests_of_quarantined_kernels_are_left_out(tested):
    found = tested(EFFATTN_QUARANTINE='[["another", "cuda"], ["an_operator_of_two", "triton"]]')
    assert {name for name in found if "triton]" in name} == set() and found["test_both[0-cuda]"][0] == "ok"
    name = "tests of an_operator_of_two: triton, part 1 of 1"
    assert found[name] == ("skipped", "3 tests: its kernels are quarantined")


# --- lines --------------------------------------------------------------------------------------------


def test_lines_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "results.jsonl"
    writer = lines.Writer(path, lambda: {"commit": "abc", "gpu": "a GPU"})
    writer.write("smoke", "a", Status.OK, error=0.5)
    writer.write("smoke", "b", "crashed", reason="SIGSEGV", row={"samples": [1.0, math.nan]})
    writer.write("smoke", "a", Status.WRONG)
    first, second, third = lines.read(path)
    assert first["error"] == 0.5 and first["commit"] == "abc" and first["at"] >= 0
    assert second["row"] == {"samples": [1.0, None]}, "JSON has no NaN"
    assert second["status"] == "crashed" and lines.latest([first, second, third]) == [third, second]
    with pytest.raises(ValueError, match="'nonsense' is not a valid Status"):
        writer.write("smoke", "c", "nonsense")


def test_the_end_of_a_run_that_was_killed(tmp_path):
    path = tmp_path / "results.jsonl"
    line = '{"stage": "smoke", "name": "a", "status": "ok"}'
    path.write_text(f"{line}\n{line[:20]}")
    assert len(lines.read(path)) == 1
    path.write_text(f"{line[:20]}\n{line}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: expected a JSON object"):
        lines.read(path)
    path.write_text('{"stage": "smoke"}\n')
    with pytest.raises(ValueError, match="line 1: expected a line with stage, name and status"):
        lines.read(path)
