"""Tests that fail in every way that a GPU knows, for a rehearsal; pytest collects them only when they are named."""

from __future__ import annotations

import pytest

from benchmarks.gpu.faults import FAULTS


def test_before() -> None:
    assert True


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str) -> None:
    FAULTS[fault]()


def test_wrong() -> None:
    assert 1 == 2, "a wrong result"


def test_after() -> None:
    assert True
