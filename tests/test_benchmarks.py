"""What the benchmarks rely on and would not notice if it failed."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from same import assert_same

from benchmarks import environment, modules, peers, report, results
from benchmarks import linear_attention as rla
from benchmarks import runner as cpu_runner
from benchmarks.floor import Rates, Work
from benchmarks.gpu import cases, runner
from benchmarks.gpu.clock import WallClock
from benchmarks.lite_mla import lite_mla
from benchmarks.runner import FORMER, RESTED, STEADY, Accuracy, Candidate, Case, Role, Row
from benchmarks.suites import SUITES, Settings, TimedSuite, rests


@pytest.mark.full
def test_compiled_modules_are_frozen():
    """Peers get their best setting: a frozen weight is a constant that no change reaches."""
    linear, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with torch.no_grad():
        expected = linear(x)
        module = peers.compiled_module(linear, x)
        linear.weight.add_(1.0)
        assert torch.allclose(module(x), expected)


def test_compiled_modules_train():
    linear, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    module = peers.compiled_module(linear, x)
    module(x).sum().backward()
    assert linear.weight.grad is not None


class Machine:
    """A clock that only sleeping and calling move, and what a machine does to calls in the meantime.

    A call takes 1 ms; 4 ms while the threads of onnxruntime spin, 35 ms after its call; and after 50 ms of idleness
    9 ms, until 20 ms after the first has begun.
    """

    def __init__(self):
        self.now = self.spinning_until = self.waking_until = self.busy_at = 0.0
        self.done: list[str] = []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.done.append(f"rest {seconds}")
        self.now += seconds

    def call(self):
        if self.now - self.busy_at > 0.05:
            self.waking_until = self.now + 0.02
        self.now += 9e-3 if self.now < self.waking_until else 4e-3 if self.now < self.spinning_until else 1e-3
        self.busy_at = self.now
        self.done.append("call")

    def onnxruntime(self):
        self.now += 1e-3
        self.busy_at, self.spinning_until = self.now, self.now + 0.035


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(cpu_runner, "time", machine)
    return machine


def made_case(*candidates, protocol=STEADY):
    """A case of calls as they are, all right, by (name, role, call)."""
    made = [
        Candidate(name, "NCHW", role, lambda data, call=call: call, lambda data, result: Accuracy(0.0, 0.0))
        for name, role, call in candidates
    ]
    work = Work(bytes=0, flops=0)
    return Case("made", torch.float32, {}, work, tuple(made), lambda: None, protocol=protocol)


def ignore(doing, steps):
    """Progress that nobody watches."""


def test_a_sample_rests_warms_up_and_is_timed(machine):
    """The warm-up is three calls of 9 ms and some of 1; a first call is the 9 ms that it takes."""
    machine.now = 1.0
    assert STEADY.sample(machine.call, 3) == pytest.approx(1e-3)
    untimed = 3 + round((STEADY.warm_up - 3 * 9e-3) / 1e-3)
    assert machine.done[0] == f"rest {STEADY.rest}" and set(machine.done[1:]) == {"call"}
    assert len(machine.done) - 1 in (untimed + 3, untimed + 4)  # the clock's sum of them is rounded
    machine.done.clear()
    assert RESTED.sample(machine.call, 1) == pytest.approx(9e-3)
    assert machine.done == [f"rest {RESTED.rest}", "call"]
    machine.done.clear()
    assert FORMER.sample(machine.call, 2) == pytest.approx(1e-3)
    assert machine.done == [f"rest {FORMER.rest}", *["call"] * (1 + 2)]


def test_short_calls_are_repeated_in_a_sample():
    assert [STEADY.repeats(seconds) for seconds in (1e-4, 3e-4, 1e-3, 2.0)] == [10, 4, 1, 1]
    assert RESTED.repeats(1e-4) == 1


def test_what_comes_before_a_call_disturbs_only_the_former_protocol(machine):
    """The suite ``rests`` on the simulated machine: a row that warns, and one that does not."""
    for disturb in (machine.onnxruntime, lambda: machine.sleep(0.09)):
        for protocol, disturbed in ((FORMER, True), (STEADY, False), (rests.LOOP, False)):
            stock, again = ("stock", Role.PEER, machine.call), ("stock (again)", Role.CHECK, machine.call)
            case = made_case(stock, ("disturber", Role.CONTEXT, disturb), again, protocol=protocol)
            rows = cpu_runner.measure("rests", case, 5, ignore)
            result = report.CaseResult("made", tuple(rows))
            assert result.doubtful is disturbed, (protocol.name, result.check)
            assert disturbed or [row.milliseconds for row in (rows[0], rows[2])] == pytest.approx([1.0, 1.0])
            assert {row.protocol for row in rows} == {protocol.name}


def test_the_stock_formulation_is_timed_after_what_disturbs_it():
    for case in SUITES["rests"].cases(False):
        stock, disturber, again = case.candidates
        assert (stock.role, disturber.role, again.role) == (Role.PEER, Role.CONTEXT, Role.CHECK)
        assert again.name == stock.name + report.CHECK_SUFFIX and again.variant == stock.variant
        assert disturber.name in ("onnxruntime", "a pause")
    protocols = [case.protocol for case in SUITES["rests"].cases(False)]
    assert protocols.count(FORMER) == protocols.count(STEADY) == protocols.count(rests.LOOP) == 4
    assert rests.PAUSE_SECONDS < cpu_runner.SLOW_SECONDS


def test_calls_of_seconds_take_few_rounds(machine):
    def call():
        machine.sleep(2.0)

    (row,) = cpu_runner.measure("suite", made_case(("slow", Role.PEER, call)), 15, ignore)
    assert row.samples == pytest.approx([2000.0] * cpu_runner.LONG_ROUNDS)
    # The gate, the length of a call, and no warm-up.
    assert machine.done.count("rest 2.0") == 2 + cpu_runner.LONG_ROUNDS


def test_first_calls_are_those_of_everyone():
    """``rested``: cases of other suites with all of their candidates, one call after a rest, no floor."""
    made = SUITES["rested"].cases(False)
    assert {tuple(case.name.split(": ")) for case in made} == set(rests.REPRESENTATIVE)
    for case in made:
        suite, name = case.name.split(": ")
        (original,) = [other for other in SUITES[suite].cases(False) if other.name == name]
        assert [c.name for c in case.candidates] == [c.name for c in original.candidates]
        assert {"onnxruntime", "OpenVINO", "TFLite", "ExecuTorch"} <= {c.name for c in case.candidates}
        assert case.protocol is RESTED and case.work == Work(bytes=0, flops=0)


def test_first_calls_get_more_rounds(machine):
    case = made_case(("stock", Role.PEER, machine.call), protocol=RESTED)
    suite = TimedSuite("first", "first", lambda short: [case], rounds_factor=2)
    (row,) = suite.run(Settings(3), Rates(), ignore)
    assert row.samples == pytest.approx([9.0] * 6) and row.floor_milliseconds is None
    assert suite.steps(Settings(3)) == cpu_runner.BUILD_STEPS + 6


def test_the_command_line_knows_every_suite(monkeypatch):
    typer = pytest.importorskip("typer")
    from benchmarks import __main__ as command_line

    monkeypatch.setattr(environment, "restart_with_kept_heap", lambda: None)
    monkeypatch.setattr(environment, "use_private_compile_cache", lambda: None)
    with pytest.raises(typer.BadParameter, match=f"expected {', '.join(SUITES)} or all, got none"):
        command_line.run(["none"])


@pytest.mark.parametrize("package", ["ai_edge_litert.interpreter", "litert_torch", "executorch"])
def test_a_peer_that_is_not_installed_is_a_reason(package, monkeypatch):
    """In modules and in the attention alone; in the table it stays."""
    monkeypatch.setitem(sys.modules, package, None)
    if package == "litert_torch":  # asked for after the interpreter
        monkeypatch.setitem(sys.modules, "ai_edge_litert", object())
        monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", Interpreterless)
    name = "ExecuTorch" if package == "executorch" else "TFLite"
    module = modules.make_case(lite_mla("tiny", 1, 16, 8, 3, 3))
    attention = rla.make_case(rla.AttentionCase("tiny", 1, 2, 8, 3, 3), rla.runtime_candidates(torch.float32))
    for case in (module, attention):
        candidates = [candidate for candidate in case.candidates if candidate.name == name]
        rows = cpu_runner.measure("suite", dataclasses.replace(case, candidates=tuple(candidates)), 1, ignore)
        assert rows and all(row.milliseconds is None and package in row.reason for row in rows)
        assert f"{name}: {rows[0].reason}" in report.table(made_results(rows))


class Interpreterless:
    Interpreter = None


@pytest.mark.parametrize(("name", "package"), [("tflite_call", "litert_torch"), ("executorch_call", "executorch.exir")])
def test_peers_that_torch_exports_to(name, package):
    """Inputs in their order, in place, again and again; images of TFLite in its own memory order."""
    pytest.importorskip(package, reason=f"{package} is a peer that make bench installs")
    run = getattr(peers, name)
    data = rla.Inputs(rla.AttentionCase("tiny", 1, 2, 8, 3, 5), torch.float32)
    with torch.no_grad():
        for layout in rla.LAYOUTS:
            call = rla._exported_call(run, layout, data)
            for _ in range(3):
                assert rla.peer_gate(data, call()).passed
        convolution = torch.nn.Conv2d(3, 5, 3).eval()
        x = torch.randn(2, 3, 6, 7)
        for format_ in modules.FORMATS.values() if name == "tflite_call" else [torch.contiguous_format]:
            call = run(convolution, (x.to(memory_format=format_),))
            for _ in range(2):
                assert_same(call(), convolution(x))


def timed_row(suite, case, candidate, role, milliseconds, protocol="steady"):
    return Row(suite, case, "float32", {}, candidate, "NCHW", role, milliseconds, [milliseconds], protocol=protocol)


def made_results(*parts):
    """A results file with one suite for each list of rows."""
    data = {"schema": results.SCHEMA, "suites": {}}
    for rows in parts:
        results.add(data, rows[0].suite, rows[0].suite, Settings(1), environment.facts(), Rates(), rows)
    return data


def test_moved_speed_ups_are_marked():
    def taken(ours, theirs, protocol):
        return [
            timed_row("softmax", case, candidate, role, milliseconds, protocol)
            for case, peer in (("moved", theirs), ("stayed", 2.0))
            for candidate, role, milliseconds in (("effattn", "ours", ours), ("stock", "peer", peer))
        ]

    before, after = made_results(taken(1.0, 2.0, None)), made_results(taken(1.0, 3.0, "steady"))
    lines = report.comparison(before, after).splitlines()
    (moved,), (stayed,) = ([line.split() for line in lines if name in line.split()[:2]] for name in ("moved", "stayed"))
    assert moved[-4:] == ["2.00x", "3.00x", "1.50", "moved"]
    assert stayed[-3:] == ["2.00x", "2.00x", "1.00"]
    assert lines[-1].startswith("softmax: ") and lines[-1].endswith("protocol steady")
    assert lines[-1].count("protocol") == 1  # results of before have no name for theirs
    with pytest.raises(ValueError, match="a case that has a speed-up in both, got none"):
        report.comparison(before, made_results([timed_row("softmax", "other", "effattn", "ours", 1.0)]))


def test_the_readme_has_a_column_for_first_calls():
    rows = {
        suite: [timed_row(suite, case, "effattn", "ours", 1.0), timed_row(suite, case, "stock", "peer", factor)]
        for suite, case, factor in (("softmax", "CGA", 2.0), ("rested", "softmax: CGA", 3.0))
    }
    table = report.readme_table([made_results(*rows.values())])
    assert "speed-up, first call after a rest [1]" in table and "| 2.00x" in table and "| 3.00x" in table
    without = report.readme_table([made_results(rows["softmax"])])
    assert "first call" not in without and "| 2.00x" in without


class Heard:
    """What a case told while it was measured: (row, error, provisional), and the names of what was begun."""

    def __init__(self):
        self.begun, self.finished = [], []

    def begin(self, row):
        self.begun.append((row.candidate, row.variant))

    def finish(self, row, error, provisional=False):
        self.finished.append((row.candidate, row.variant, len(row.samples), provisional))


def measured(case, ways=None, rounds=2):
    heard = Heard()
    ways = runner.plain_ways(case, ["reference"]) if ways is None else ways
    return runner.measure(case, ways, WallClock(), rounds, heard), heard


TINY = {
    f"{measured.operator.name}: {shape.name}": (measured, shape)
    for measured in cases.MEASURED
    for shape in measured.tiny
}


def tiny(training=False):
    measured, shape = next(iter(TINY.values()))
    return measured.case(shape, training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_case_of_a_gpu(name, training):
    """On the CPU, by the reference: everyone is right, and has a time in a graph and as calls."""
    of, shape = TINY[name]
    rows, heard = measured(of.case(shape, training))
    assert {"ours", "peer", "check"} <= {row.role for row in rows} and {row.variant for row in rows} == {
        "graph",
        "calls",
    }
    for row in rows:
        assert row.reason is None and row.milliseconds > 0 and len(row.samples) == 2, (row.candidate, row.reason)
    first, last = heard.finished[: len(rows)], heard.finished[len(rows) :]
    assert [entry[2:] for entry in first] == [(1, True)] * len(rows), "after its first sample each is told of"
    assert [entry[2:] for entry in last] == [(2, False)] * len(rows)
    assert heard.begun == [(row.candidate, row.variant) for row in rows] * 2


def test_a_wrong_result_gets_no_time_on_a_gpu_either():
    case = tiny()
    wrong = dataclasses.replace(case, ours=lambda *arguments: 2 * case.ours(*arguments))
    rows, _ = measured(wrong)
    ours = [row for row in rows if row.role == "ours"]
    assert len(ours) == 2 and all(row.milliseconds is None and row.reason.startswith("wrong: ") for row in ours)


def test_what_fails_later_has_no_time(monkeypatch):
    """The first sample was taken, another raised."""
    monkeypatch.setattr(runner, "WARM_SECONDS", 0)
    clock, left = WallClock(), iter([1.0, 1.0])
    monkeypatch.setattr(clock, "seconds", lambda *_: next(left))
    case, heard = tiny(), Heard()
    (row,) = runner.measure(case, runner.plain_ways(case, [])[:1], clock, 3, heard)
    assert row.milliseconds is None and "StopIteration" in row.reason and len(row.samples) == 1
    assert [provisional for *_, provisional in heard.finished] == [True, False]


def test_a_case_whose_inputs_fail_is_a_reason():
    def make():
        raise torch.OutOfMemoryError("too large")

    rows, heard = measured(dataclasses.replace(tiny(), make=make))
    assert {row.reason for row in rows} == {"OutOfMemoryError: too large"} and len(heard.finished) == len(rows)


def test_everyone_can_be_compiled(monkeypatch):
    """As far as recording the graphs; of one case in every mode."""
    modes = []

    def compile_(function, mode, **options):
        modes.append(mode)
        return torch._dynamo.optimize("aot_eager", nopython=True)(function)

    monkeypatch.setattr(torch, "compile", compile_)
    for i, (of, shape) in enumerate(TINY.values()):
        case = of.case(shape, training=True)
        rows, _ = measured(case, runner.compiled_ways(case, runner.QUICK_MODES[:1] if i else runner.ALL_MODES), 1)
        assert all(row.reason is None for row in rows), [(row.candidate, row.reason) for row in rows]
    assert set(modes) == {"default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"}


def test_every_backend_of_a_gpu_is_measured():
    """Each under its name; of whole models, whatever serves."""
    case = tiny()
    found = runner.ours(case, ["cuda", "triton"])
    assert set(found) == {"effattn cuda", "effattn triton"}
    with pytest.raises(RuntimeError, match="cuda: "):
        found["effattn cuda"](*case.make())
    whole = dataclasses.replace(case, compile_ours=True)
    assert set(runner.ours(whole, ["cuda", "triton"])) == {runner.OURS}


def test_the_cases_of_a_gpu_can_be_made():
    """As far as a machine without one goes: their names, sizes and floors; not their tensors."""
    for name, (_, make) in cases.SUITES.items():
        if name == "gpu-models":
            continue
        made = list(make())
        assert len({(case.name, case.dtype) for case in made}) == len(made) > 0
        assert all(case.suite == name and case.work.bytes > 0 and case.work.flops > 0 for case in made)
