"""What a call of the CUDA kernels allocates: its results, and the workspace that its sizes ask for."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from effattn import (
    _library,
    biased_attention,
    cascaded_group_attention,
    multi_scale_aggregation,
    multi_scale_linear_attention,
    registry,
    relu_linear_attention,
    use_backend,
)
from effattn.testing import BiasedCase, CascadeCase, MultiScaleCase, make_tensor, moved

REASON = next(backend.reason for backend in registry.backends() if backend.name == "cuda")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the cuda backend: {REASON}")
DEVICE = torch.device("cpu" if _library.cuda_is_emulated else "cuda")
#: Parts whose sums over tokens are added up, at most: tokens are split into no more (kMaxParts of reduction.cu).
PARTS = 64


def sums(heads, head_dim, value_dim):
    return 4 * heads * head_dim * (value_dim + 1)


def allocated(function):
    """The output of a call, and how many bytes it allocated in all."""
    if DEVICE.type == "cuda":
        name = "requested_bytes.all.allocated"
        before = torch.cuda.memory_stats().get(name, 0)
        out = function()
        return out, torch.cuda.memory_stats()[name] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = function()
    events = profiler.profiler.kineto_results.events()
    return out, sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def linear(tokens):
    qkv = [make_tensor(2, 3, tokens, 8, seed=seed).to(DEVICE) for seed in range(3)]
    return lambda: relu_linear_attention(*qkv)


def of(function, case):
    inputs = {
        k: moved(v, DEVICE) if isinstance(v, torch.Tensor) else [t.to(DEVICE) for t in v]
        for k, v in case.inputs().items()
    }
    return lambda: case.call(function, inputs)


#: What makes a call for inference, and the most bytes of workspace.
CALLS = {
    "linear attention, few tokens": (lambda: linear(49), 0),
    "linear attention, more": (lambda: linear(9000), (1 + PARTS) * sums(2 * 3, 8, 8)),
    "aggregation": (lambda: of(multi_scale_aggregation, MultiScaleCase(2, 1, 8, 9, 10)), 0),
    "multi-scale attention": (
        lambda: of(multi_scale_linear_attention, MultiScaleCase(2, 1, 8, 9, 10)),
        (1 + PARTS) * sums(2 * 2, 8, 8),
    ),
    "cascade": (lambda: of(cascaded_group_attention, CascadeCase(2, 64, 16, 14, 14, 7, (5, 3))), 0),
    "biased attention": (lambda: of(biased_attention, BiasedCase(2, 3, 49, 49, 16, 32)), 0),
    "biased attention of 1024 tokens": (lambda: of(biased_attention, BiasedCase(1, 1, 64, 1024, 8, 8)), 0),
    "talking heads": (lambda: of(biased_attention, BiasedCase(2, 4, 49, 49, 8, 8, talking=True)), 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_inference_allocates_no_more_than_planned(name):
    make, workspace = CALLS[name]
    call = make()
    with use_backend("cuda"), torch.no_grad():
        call()
        out, in_all = allocated(call)
    results = out.numel() * out.element_size()
    assert results <= in_all <= results + workspace + 64, "64 bytes for scalars that torch wraps"
