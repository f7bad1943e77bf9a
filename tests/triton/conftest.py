"""Triton's kernels run here in one of two ways: on a GPU, or under TRITON_INTERPRET=1 on tensors of the CPU."""

from __future__ import annotations

import os

import pytest
import torch

from effattn import registry, use_backend
from effattn.backends.triton import is_interpreted

# Asked for by torch, before anything runs, where tests want uninitialised memory to be poisoned.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device():
    """Where the kernels run, with the backend in use."""
    reason = next(b.reason for b in registry.backends() if b.name == "triton")
    if reason is not None:
        pytest.skip(f"the triton backend: {reason}")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # or convolutions of what is compared with are off by 1e-3
    with use_backend("triton"):
        yield torch.device("cpu" if is_interpreted() else "cuda")
    torch.backends.cudnn.allow_tf32 = before
