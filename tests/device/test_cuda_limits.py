"""Sizes that only the CUDA kernels have a limit for: right up to there, named beyond, or slower."""

from __future__ import annotations

import pytest
import torch

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
from effattn.testing import (
    FLOAT32_FORWARD_TOLERANCE,
    FLOAT32_GRADIENT_TOLERANCE,
    BiasedCase,
    CascadeCase,
    MultiScaleCase,
    check_multi_scale,
    check_softmax,
    error,
    make_tensor,
    with_gradients,
)

REASON = next(backend.reason for backend in registry.backends() if backend.name == "cuda")
pytestmark = [
    pytest.mark.each_value,
    pytest.mark.skipif(REASON is not None, reason=f"the cuda backend: {REASON}"),
    pytest.mark.usefixtures("poisoned_allocations"),
]
DEVICE = torch.device("cpu" if _library.cuda_is_emulated else "cuda")


def unmergeable(rank):
    """q, k and v whose leading dimensions lie in reverse order."""
    dims = (*reversed(range(rank - 2)), rank - 2, rank - 1)
    return [make_tensor(*(2,) * (rank - 2), 3, 2, seed=seed).permute(dims).to(DEVICE) for seed in range(3)]


BEYOND = {
    "dimensions": (lambda: relu_linear_attention(*unmergeable(15)), "tensors of up to 14 dimensions, not 15"),
    "kernel": (
        lambda: call(multi_scale_aggregation, MultiScaleCase(1, 1, 1, 2, 3, kernels=(3, 99))),
        "convolutions of up to 97 x 97, not 99",
    ),
    "scales": (
        lambda: call(multi_scale_linear_attention, MultiScaleCase(1, 1, 1, 2, 3, kernels=(1,) * 9)),
        "up to 8 scales, not 9",
    ),
    "heads": (
        lambda: call(cascaded_group_attention, CascadeCase(1, 65, 1, 1, 2, None, (1,) * 65)),
        "cascades of up to 64 heads, not 65",
    ),
}


def call(function, case):
    return with_gradients(function, "cuda", case, case.inputs(), torch.float32, DEVICE)


@pytest.mark.parametrize("name", BEYOND)
def test_a_limit_is_named(name):
    beyond, limit = BEYOND[name]
    with use_backend("cuda"), pytest.raises(RuntimeError, match=f"cuda: takes {limit}"):
        beyond()


def test_the_most_dimensions():
    q, k, v = unmergeable(14)
    with use_backend("cuda"):
        out = relu_linear_attention(q, k, v).cpu()
    with use_backend("reference"):
        truth = relu_linear_attention(*(t.double().cpu() for t in (q, k, v)))
    assert error(out, truth) <= FLOAT32_FORWARD_TOLERANCE * truth.norm()


@pytest.mark.parametrize("function", [multi_scale_aggregation, multi_scale_linear_attention])
def test_the_largest_kernel(function):
    check_multi_scale(function, "cuda", MultiScaleCase(1, 1, 2, 2, 19, kernels=(97,)), device=DEVICE)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", [11, 31, 71])
def test_large_kernels_of_wide_heads(head_dim, kernel):
    """They leave the least of shared memory for what is staged."""
    case = MultiScaleCase(1, 1, head_dim, 2, 3, kernels=(kernel,))
    check_multi_scale(multi_scale_aggregation, "cuda", case, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [BiasedCase(1, 8, 17, 430, 4, 4, talking=True), BiasedCase(2, 1, 3, 26000, 2, 2)], ids=["heads", "keys"]
)
def test_logits_that_do_not_fit_into_shared_memory(case, dtype):
    check_softmax(biased_attention, "cuda", case, dtype, device=DEVICE)


def test_the_most_heads():
    """Of what goes through all of them: a weight's gradient may nearly vanish, in a chain this long."""
    case = CascadeCase(1, 64, 1, 1, 2, None, (1,) * 64)
    results = call(cascaded_group_attention, case)
    truth = with_gradients(cascaded_group_attention, "reference", case, case.inputs(), torch.float64)
    for name, tolerance in (("out", FLOAT32_FORWARD_TOLERANCE), ("grad x", FLOAT32_GRADIENT_TOLERANCE)):
        assert error(results[name], truth[name]) <= tolerance * truth[name].norm()
