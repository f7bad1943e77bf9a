"""The search for faster launches calls a launcher again and again, with the same results to fill."""

from __future__ import annotations

import pytest
import torch
from specified import mapped, with_gradients

from effattn.backends.triton import LAUNCHERS, _tuning
from effattn.ops import OPERATORS
from effattn.testing import make_arguments


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_may_be_called_again(name, backend, device, monkeypatch):
    operator, seen = OPERATORS[name], []

    def before(launcher, device, given):
        seen.append(launcher)
        launcher(*given)

    arguments = mapped(lambda t: t.to(device), make_arguments(operator, operator.cases[0]))
    once = with_gradients(operator, operator, arguments, torch.float32)
    monkeypatch.setattr(_tuning, "is_on", lambda: True)
    monkeypatch.setattr(_tuning, "before", before)
    again = with_gradients(operator, operator, arguments, torch.float32)
    assert len(set(seen)) == 2, "a forward and a backward"
    assert all(torch.equal(once[name], again[name]) for name in once)
