"""Which backends with kernels for GPUs run here, in one of three ways: on a GPU; Triton's under TRITON_INTERPRET=1, and
CUDA's emulated (tests/emulated.py), both on tensors of the CPU."""

from __future__ import annotations

import os

import torch

from effattn import _library, registry
from effattn.backends.triton import is_interpreted

REASONS = {b.name: b.reason for b in registry.backends() if b.name in ("triton", "cuda")}
HERE = [name for name, reason in REASONS.items() if reason is None]
#: What a run is for: without it, the same tests would pass on something else, or be skipped.
WANTED = os.environ.get("EFFATTN_TESTED_BACKEND")
if WANTED is not None and WANTED not in HERE:
    raise RuntimeError(f"EFFATTN_TESTED_BACKEND={WANTED}: {REASONS[WANTED]}")


def device_of(backend: str) -> torch.device:
    """Where its tensors are."""
    on_host = is_interpreted() if backend == "triton" else _library.cuda_is_emulated
    return torch.device("cpu" if on_host else "cuda")
