"""The multi-scale operators on GPUs, as their kernels are made: tiles and rows of vectors, parts, kernel sizes."""

from __future__ import annotations

import pytest
import torch
from cuda_only import cuda_only
from limits import check_that_a_limit_is_named
from same import assert_as_near
from specified import check_against_float64
from tiers import full
from views import VIEWS

from effattn import multi_scale_linear_attention, use_backend
from effattn._triton import configs
from effattn.ops import OPERATORS
from effattn.testing import ORDERS

pytestmark = [pytest.mark.each_value, pytest.mark.usefixtures("device", "poisoned_allocations")]

ATTENTION, AGGREGATION = (OPERATORS[f"multi_scale_{name}"] for name in ("linear_attention", "aggregation"))
NARROW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *NARROW)

both = pytest.mark.parametrize("operator", [ATTENTION, AGGREGATION], ids=lambda operator: operator.name)


def case(batch, heads, head_dim, height, width, kernels=(5,), biases=False):
    return {
        **{"B": batch, "heads": heads, "head_dim": head_dim, "H": height, "W": width, "S": len(kernels), "k": kernels},
        **{"eps": 1e-15, "without": () if biases else ("dw_biases", "pw_biases")},
    }


CASES = {
    "two images": case(2, 1, 16, 5, 6),
    "two scales": case(1, 1, 8, 8, 9, (3, 7), biases=True),
    "a kernel larger than the image": case(1, 1, 13, 6, 5, (9, 1), biases=True),
    "heads in several chunks": case(1, 1, 33, 5, 6, (3,), biases=True),
    "no scales": case(2, 3, 4, 1, 1, ()),
    "several tiles": case(1, 1, 3, 2, 70, (3,)),
    "rows of whole vectors": case(1, 1, 8, 9, 24, (3,), biases=True),
    "wide heads": case(1, 1, 64, 2, 9, (3,)),
    "the widest heads": case(1, 1, 128, 2, 9, (1,)),
}


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [full(name) if name == "wide heads" else name for name in CASES])
@pytest.mark.numerics
def test_sizes_around_tiles(device, backend, operator, name, order, dtype):
    check_against_float64(operator, CASES[name], dtype, order, backend, device)


@both
@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.numerics
def test_views_of_images(device, backend, operator, view, dtype):
    sizes = case(2, 1, 8, 5, 6, (3,), biases=True)
    check_against_float64(operator, sizes, dtype, "first", backend, device, view)


#: Heads that fill what is padded and heads that do not.
NARROW_CASES = {
    "32": case(1, 1, 32, 9, 20, biases=True),
    "13": case(1, 1, 13, 10, 18, (3, 5)),
    "3": case(1, 2, 3, 5, 21),
    "24": case(2, 1, 24, 8, 16, (3,)),
    "several tiles and parts": case(1, 1, 8, 25, 40, biases=True),
}


@cuda_only  # which has kernels for them
@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NARROW_CASES)
@pytest.mark.numerics
def test_narrow_attention(device, backend, name, order, dtype):
    check_against_float64(ATTENTION, NARROW_CASES[name], dtype, order, backend, device)


@cuda_only
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.numerics
def test_narrow_attention_of_views(device, backend, view, dtype):
    """In every place that memory can have them."""
    check_against_float64(ATTENTION, NARROW_CASES["32"], dtype, "first", backend, device, view)


@cuda_only
@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(("head_dim", "kernels"), [(13, (3, 5)), (32, (5,))], ids=str)
def test_blocks_that_take_several_tiles_of_queries(device, backend, head_dim, kernels, order, dtype, monkeypatch):
    monkeypatch.setenv("EFFATTN_EMULATED_MULTIPROCESSORS", "4")
    batch = 1 if device.type == "cpu" else 64  # of a GPU's multiprocessors more are wanted
    sizes = case(batch, 1, head_dim, 26, 40, kernels, biases=True)
    check_against_float64(ATTENTION, sizes, dtype, order, backend, device)


@both
@pytest.mark.numerics
def test_sums_in_several_parts(device, backend, operator, monkeypatch):
    """Few heads and many tokens; the last part is short."""
    height, width = 23, 25
    if backend == "triton":  # the interpreter takes its time for each tile
        height, width = 10, 15
        monkeypatch.setattr(configs, "MIN_TOKENS", 64)
        assert configs.split(2, height * width, 64)[1] > 1
    sizes = case(1, 1, 4, height, width, (3,))
    check_against_float64(operator, sizes, torch.float32, "first", backend, device)


@both
def test_wider_heads_are_refused(device, backend, ops, operator):
    limit = "heads of up to 128 channels, not 129"
    check_that_a_limit_is_named(operator, case(1, 1, 129, 2, 2), backend, device, limit, ops=ops)


@both
@cuda_only
@pytest.mark.parametrize(
    ("kernels", "limit"),
    [((3, 99), "convolutions of up to 97 x 97, not 99"), ((1,) * 9, "up to 8 scales, not 9")],
    ids=["kernel", "scales"],
)
def test_what_is_beyond_a_limit_is_refused(device, backend, operator, kernels, limit):
    check_that_a_limit_is_named(operator, case(1, 1, 1, 2, 3, kernels), backend, device, limit)


@both
@cuda_only
def test_the_largest_kernel(device, backend, operator):
    check_against_float64(operator, case(1, 1, 2, 2, 19, (97,)), torch.float32, "first", backend, device)


@cuda_only
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", [11, 31, 71])
def test_large_kernels_of_wide_heads(device, backend, head_dim, kernel):
    """They leave the least of shared memory for what is staged."""
    check_against_float64(AGGREGATION, case(1, 1, head_dim, 2, 3, (kernel,)), torch.float32, "first", backend, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_addresses_of_a_large_image(device):
    """More than 2^31 elements in one tensor; the last image is as right as the plain formulation."""
    qkv = torch.empty(12, 48, 2048, 2048, dtype=torch.float16, device="cuda")
    assert qkv.numel() > 2**31
    qkv[-1].normal_()
    dw = [torch.randn(48, 1, 3, 3, device="cuda") / 3]
    pw = [torch.randn(48, 16, 1, 1, device="cuda") / 4]
    with torch.no_grad():
        out = multi_scale_linear_attention(qkv, dw, pw, head_dim=16)[-1:]
        with use_backend("reference"):
            plain = multi_scale_linear_attention(qkv[-1:], dw, pw, head_dim=16)
            wide = [[t.double() for t in weights] for weights in (dw, pw)]
            truth = multi_scale_linear_attention(qkv[-1:].double(), *wide, head_dim=16)
    assert_as_near(out, plain, truth)
