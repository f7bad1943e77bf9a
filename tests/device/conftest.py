"""Kernels of cards run here in one of three ways: on a GPU; Triton's under TRITON_INTERPRET=1, and CUDA's emulated
(tests/emulated.py), both on tensors of the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from effattn import _library, registry, use_backend
from effattn.backends.triton import NAMESPACE, is_interpreted

# Asked for by torch, before anything runs, where tests want uninitialised memory to be poisoned.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.emulated)


REASONS = {b.name: b.reason for b in registry.backends() if b.name in ("triton", "cuda")}
HERE = [name for name, reason in REASONS.items() if reason is None]


@pytest.fixture(params=HERE or ["none"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend for cards that can run here, in use."""
    if request.param not in HERE:
        pytest.skip("; ".join(f"the {name} backend: {reason}" for name, reason in REASONS.items()))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # or convolutions of what is compared with are off by 1e-3
    with use_backend(request.param):
        yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where it runs."""
    on_host = is_interpreted() if backend == "triton" else _library.cuda_is_emulated
    return torch.device("cpu" if on_host else "cuda")


@pytest.fixture
def ops(backend: str) -> Any:
    """Its operators."""
    return getattr(torch.ops, NAMESPACE if backend == "triton" else "effattn")
