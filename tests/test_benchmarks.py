"""What the benchmarks rely on and would not notice if it failed."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

import effattn
from benchmarks import peers, report, results
from benchmarks.gpu import cases, runner, session
from benchmarks.gpu.cases import NARROW
from benchmarks.gpu.clock import WallClock
from effattn.registry import BackendStatus
from effattn.testing import AttentionCase, BiasedCase, CascadeCase, MultiScaleCase

MEASURE = runner.measure


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


def test_a_rehearsal_of_the_benchmark_of_a_gpu(tmp_path, monkeypatch):
    """Every kind of case, tiny, on the CPU: who computes something else, or breaks, has no time."""
    tiny = {
        "gpu-attention": lambda training: [cases._attention(AttentionCase("tiny", 1, 2, 8, 3, 3), NARROW, training)],
        "gpu-multi-scale": lambda training: [cases._multi_scale("tiny", MultiScaleCase(1, 1, 8, 5, 6), training)],
        "gpu-cascade": lambda training: [cases._cascade("tiny", CascadeCase(1, 8, 4, 6, 6, 3, (3, 3)), training)],
        "gpu-biased": lambda training: [
            cases._biased(f"tiny, {talking}", BiasedCase(1, 2, 5, 6, 4, 8, talking), training)
            for talking in (False, True)
        ],
    }
    suites = {name: (name, partial(make, False)) for name, make in tiny.items()}
    suites |= {f"{name}-training": (name, partial(make, True)) for name, make in tiny.items()}
    monkeypatch.setattr(session, "SUITES", suites)
    said: list[str] = []
    path = session.run(None, 1e9, 2, (), 0, tmp_path, said.append, WallClock())
    data = results.read(path)
    assert set(data["suites"]) == set(suites) and len(said) == 10
    rows = [row for name in suites for row in results.rows(data, name)]
    assert {row.role for row in rows} == {"ours", "peer", "check", "context"}
    assert {row.variant for row in rows} == {"graph", "calls"}
    for row in rows:
        assert row.reason is None and row.milliseconds > 0, (row.suite, row.candidate, row.reason)
    assert "rehearsal, driver none" in report.table(data)


def test_a_wrong_result_gets_no_time_on_a_gpu_either(tmp_path, monkeypatch):
    case = cases._biased("tiny", BiasedCase(1, 2, 5, 6, 4, 8), False)
    wrong = dataclasses.replace(case, ours=lambda *arguments: 2 * case.ours(*arguments))
    monkeypatch.setattr(session, "SUITES", {"wrong": ("wrong", lambda: [wrong])})
    path = session.run(None, 1e9, 1, (), 0, tmp_path, str, WallClock())
    ours = [row for row in results.rows(results.read(path), "wrong") if row.role == "ours"]
    assert len(ours) == 2 and all(row.milliseconds is None and "wrong" in row.reason for row in ours)


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch):
    """Suites take turns; a case that has begun when time is over has rows without a time."""
    case = cases._biased("tiny", BiasedCase(1, 2, 5, 6, 4, 8), False)
    late = dataclasses.replace(case, name="late")
    monkeypatch.setattr(session, "SUITES", {"a": ("A", lambda: [case, late]), "b": ("B", lambda: [case])})
    clock = WallClock()
    monkeypatch.setattr(session.runner, "measure", _measured)
    moments = iter([0.0, 1.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(session.time, "monotonic", lambda: next(moments, 100.0))
    said: list[str] = []
    path = session.run(None, 50.0, 1, (), 0, tmp_path, said.append, clock)
    assert said == ["    1 s  a: tiny", "    2 s  b: tiny", "no time was left for a: late"]
    data = results.read(path)
    assert data["suites"]["a"]["title"] == "A (no time was left for: late)"
    assert data["suites"]["b"]["title"] == "B"


def _measured(case, clock, *_):
    return MEASURE(case, clock, 1, False)


def test_ways_that_there_is_no_time_for_have_none():
    case = cases._biased("tiny", BiasedCase(1, 2, 5, 6, 4, 8), False)
    over = iter([False, False])
    rows = runner.measure(case, WallClock(), 3, False, lambda: next(over, True))
    assert [row.reason for row in rows[:3]] == [None, None, "no time was left"]
    assert len(rows[0].samples) == 1


def test_a_case_whose_inputs_fail_is_a_reason(tmp_path, monkeypatch):
    def make():
        raise torch.OutOfMemoryError("too large")

    case = dataclasses.replace(cases._biased("tiny", BiasedCase(1, 2, 5, 6, 4, 8), False), make=make)
    monkeypatch.setattr(session, "SUITES", {"a": ("A", lambda: [case])})
    path = session.run(None, 1e9, 1, (), 0, tmp_path, str, WallClock())
    assert {row.reason for row in results.rows(results.read(path), "a")} == {"OutOfMemoryError: too large"}


def test_everyone_can_be_compiled(tmp_path, monkeypatch):
    """As far as recording the graphs; in every mode."""
    modes = []

    def compile_(function, mode, **options):
        modes.append(mode)
        return torch._dynamo.optimize("aot_eager", nopython=True)(function)

    monkeypatch.setattr(torch, "compile", compile_)
    tiny = {
        "attention": cases._attention(AttentionCase("tiny", 1, 2, 8, 3, 3), NARROW, True),
        "multi-scale": cases._multi_scale("tiny", MultiScaleCase(1, 1, 8, 5, 6), False),
        "cascade": cases._cascade("tiny", CascadeCase(1, 8, 4, 6, 6, 3, (3, 3)), True),
        "biased": cases._biased("tiny", BiasedCase(1, 2, 5, 6, 4, 8, True), False),
    }
    monkeypatch.setattr(session, "SUITES", {name: (name, lambda case=case: [case]) for name, case in tiny.items()})
    path = session.run(None, 1e9, 1, (), 1, tmp_path, str, WallClock())
    for name in tiny:
        rows = results.rows(results.read(path), name)
        assert any("max-autotune" in row.candidate for row in rows)
        assert all(row.reason is None for row in rows), [(row.candidate, row.reason) for row in rows]
    assert set(modes) == {"default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"}


def test_every_backend_of_a_card_is_measured(monkeypatch):
    """Where several serve, each of them under its name; else whatever serves."""
    case = cases._biased("tiny", BiasedCase(1, 2, 5, 6, 4, 8), False)
    names = {way.candidate for way in runner.ways(case, False)}
    assert runner.OURS in names and f"{runner.OURS} cuda" not in names
    status = [BackendStatus(name, None) for name in ("cpu", "triton", "cuda", "reference")]
    monkeypatch.setattr(effattn, "backends", lambda: status)
    names = {way.candidate for way in runner.ways(case, False)}
    assert {f"{runner.OURS} triton", f"{runner.OURS} cuda"} <= names and runner.OURS not in names
    with pytest.raises(RuntimeError, match="cuda: "):
        runner._ours(case.ours)[f"{runner.OURS} cuda"](*case.make())


def test_the_cases_of_a_gpu_can_be_made():
    """As far as a machine without one goes: their names, sizes and floors; not their tensors."""
    for name, (_, make) in cases.SUITES.items():
        if name == "gpu-models":
            continue
        made = list(make())
        assert len({(case.name, case.dtype) for case in made}) == len(made) > 0
        assert all(case.suite == name and case.work.bytes > 0 and case.work.flops > 0 for case in made)


def test_no_gpu_no_numbers(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        session.run(None, 1.0, 1, (), 0, tmp_path, str)
    with pytest.raises(ValueError, match=r"suite: expected some of gpu-attention, .*, got nothing"):
        session.run(["nothing"], 1.0, 1, (), 0, tmp_path, str)
