"""Sizes beyond what a backend takes."""

from __future__ import annotations

import pytest
from specified import mapped

from effattn import use_backend
from effattn.testing import make_arguments, moved


def check_that_a_limit_is_named(operator, case, backend, device, limit, change=None, ops=None) -> None:
    """Where a backend is chosen; and by its torch operator, which somebody may call, if ``ops`` are given."""
    arguments = make_arguments(operator, case)
    if change is not None:
        change(arguments)
    there = mapped(lambda t: moved(t, device), arguments)
    with use_backend(backend), pytest.raises(RuntimeError, match=f"{backend}: takes {limit}"):
        operator(*there)
    if ops is not None:
        with pytest.raises(RuntimeError, match=f"the kernels take {limit}"):
            getattr(ops, f"{operator.name}_forward")(*there)
