"""What a run on a GPU tries first is right where it is interpreted and emulated."""

from __future__ import annotations

import pytest
import torch
from tiers import full

from benchmarks.gpu import cases, names, smoke
from benchmarks.gpu.lines import Status
from benchmarks.gpu.names import Kernel


def tiny(kernel, dtype, training):
    """In place of ``cases.smoke``."""
    measured = cases.SMOKE[kernel]
    form = kernel.removeprefix(measured.operator.name)
    return [measured.case(measured.tiny[list(measured.smoke).index(form)], training, dtype)]


@pytest.mark.parametrize("direction", [full("forward"), "backward"])
@pytest.mark.parametrize("operator", cases.SMOKE)
def test_every_kernel_passes(operator, direction, backend, request, monkeypatch):
    """The backward's case is one of the forward too. Interpreted, all but tiny ones take long."""
    if backend == "triton" and not request.config.getoption("--full"):
        monkeypatch.setattr(cases, "smoke", tiny)
    dtype = names.DTYPES[[*cases.SMOKE].index(operator) % len(names.DTYPES)]
    found = smoke.check(Kernel(operator, backend, dtype, direction), most=1)  # interpreted, the others take minutes
    assert found["status"] == Status.OK, found
    assert 0 < found["error"] <= found["allowed_error"]


def test_a_wrong_kernel_does_not(backend, monkeypatch):
    from benchmarks.gpu import rehearsal

    monkeypatch.setenv(rehearsal.VARIABLE, "1")
    found = smoke.check(Kernel("wrong", backend, "float16", "forward"))
    assert found["status"] == Status.WRONG and found["error"] == pytest.approx(1, rel=1e-2)
    assert "relative error 1.0e+00, allowed 5.0e-03" in found["reason"]


def test_an_operator_that_there_is_not():
    with pytest.raises(
        ValueError, match=rf"operator: expected one of {cases.MEASURED[0].operator.name}, .*, got 'softmax'"
    ):
        cases.smoke("softmax", torch.float32, False)
