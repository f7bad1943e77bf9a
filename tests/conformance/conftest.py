"""What any backend must do for any operator, made of the specifications (effattn/ops)."""

from __future__ import annotations

import pytest


@pytest.fixture
def examples(request: pytest.FixtureRequest) -> int:
    """How many random arguments are tried."""
    return 10_000 if request.config.getoption("--full") else 100
