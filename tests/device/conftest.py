"""Kernels for GPUs, on a GPU, interpreted or emulated (tests/tools/gpu_backends.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_backends import HERE, REASONS, device_of

from effattn import use_backend
from effattn.backends.triton import NAMESPACE

# Asked for by torch, before anything runs, where tests want uninitialised memory to be poisoned.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.emulated)


@pytest.fixture(params=HERE or ["none"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend for GPUs that can run here, in use."""
    if HERE and request.param not in HERE:
        pytest.skip(f"is of {request.param} alone, where {' and '.join(HERE)} runs")
    if request.param not in HERE:
        pytest.skip("\n".join(f"the {name} backend: {reason}" for name, reason in REASONS.items()))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # or convolutions of what is compared with are off by 1e-3
    with use_backend(request.param):
        yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where it runs."""
    return device_of(backend)


@pytest.fixture
def ops(backend: str) -> Any:
    """Its operators."""
    return getattr(torch.ops, NAMESPACE if backend == "triton" else "effattn")
