"""What tests of the CUDA backend alone have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

#: In place of all backends for GPUs, on what has the fixture ``backend``.
cuda_only = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


def allocated(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, int]:
    """What a call returns, and how many bytes it allocated in all."""
    if device.type == "cuda":
        name = "requested_bytes.all.allocated"
        before = torch.cuda.memory_stats().get(name, 0)
        out = call()
        return out, torch.cuda.memory_stats()[name] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = call()
    events = profiler.profiler.kineto_results.events()
    return out, sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def workspace_of_inference(operator, arguments, device) -> int:
    """Bytes that a later call allocates beside its output."""
    with torch.no_grad():
        operator(*arguments)
        out, in_all = allocated(lambda: operator(*arguments), device)
    return in_all - out.numel() * out.element_size()


#: Bytes for scalars that torch wraps.
SCALARS = 64
