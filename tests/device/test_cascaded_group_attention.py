"""cascaded_group_attention on GPUs, as its kernels are made: windows, sizes beyond a tile, long chains, extremes."""

from __future__ import annotations

import pytest
import torch
from cuda_only import cuda_only
from limits import check_that_a_limit_is_named
from specified import check_against_float64
from views import VIEWS

from effattn.ops import OPERATORS
from effattn.testing import ORDERS

pytestmark = [pytest.mark.each_value, pytest.mark.usefixtures("device", "poisoned_allocations")]

OPERATOR = OPERATORS["cascaded_group_attention"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(batch, channels, key_dim, height, width, window, kernels, biases=True):
    """A window of None is the image."""
    rows, cols = window or (height, width)
    return {
        **{"B": batch, "heads": len(kernels), "d": channels // len(kernels), "key_dim": key_dim, "k": kernels},
        **{"H": height, "W": width, "window_height": rows, "window_width": cols, "scale": key_dim**-0.5},
        "without": () if biases else ("qkv_biases", "q_dw_biases"),
    }


CASES = {
    "two windows of a model": case(1, 32, 16, 7, 14, (7, 7), (7, 3)),
    "kernels larger than the window": case(1, 48, 16, 4, 4, None, (7, 5, 3)),
    "windows that do not divide the image": case(1, 12, 5, 5, 5, (4, 3), (3, 7), biases=False),
    "windows of one token": case(1, 8, 4, 2, 2, (1, 1), (3, 3)),
    "a window larger than the image": case(1, 7, 3, 5, 4, (7, 7), (5,)),
    "keys in several chunks": case(1, 16, 33, 3, 3, None, (3, 1)),
    "values in several chunks": case(1, 140, 4, 2, 3, None, (3, 3)),
    "queries in several tiles": case(1, 8, 4, 9, 10, None, (3, 3)),
    "nine heads": case(1, 27, 4, 3, 3, None, (3,) * 9),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.numerics
def test_sizes_around_tiles(device, backend, name, order, dtype):
    check_against_float64(OPERATOR, CASES[name], dtype, order, backend, device)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.numerics
def test_views_of_images(device, backend, view):
    sizes = case(1, 3, 2, 3, 5, (3, 3), (3,))
    check_against_float64(OPERATOR, sizes, torch.float32, "first", backend, device, view)


@pytest.mark.memcheck
def test_programs_that_take_several_windows(device, backend, monkeypatch):
    """And sums over more windows than are added up at once."""
    monkeypatch.setattr("effattn._triton.cascaded_group_attention.CASCADE_PROGRAMS", 3)
    monkeypatch.setattr("effattn._triton.reduction.ROWS_ADDED_UP", 4)
    monkeypatch.setenv("EFFATTN_EMULATED_MULTIPROCESSORS", "3")
    sizes = case(1, 8, 4, 4, 6, (2, 2), (3, 3))
    check_against_float64(OPERATOR, sizes, torch.float32, "first", backend, device)


def test_float16_logits_of_1e4(device, backend):
    def change(arguments):
        arguments[0] = arguments[0] * 300

    sizes = case(1, 32, 16, 7, 7, None, (3, 5))
    check_against_float64(OPERATOR, sizes, torch.float16, "first", backend, device, change)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(("channels", "key_dim"), [(129, 2), (2, 129)], ids=["value_dim", "key_dim"])
def test_wider_heads_are_refused(device, backend, channels, key_dim):
    sizes, limit = case(1, channels, key_dim, 2, 2, None, (3,)), "heads of up to 128 channels, not 129"
    check_that_a_limit_is_named(OPERATOR, sizes, backend, device, limit)


@cuda_only
def test_more_heads_are_refused(device, backend):
    sizes, limit = case(1, 65, 1, 1, 2, None, (1,) * 65), "cascades of up to 64 heads, not 65"
    check_that_a_limit_is_named(OPERATOR, sizes, backend, device, limit)


@cuda_only
@pytest.mark.parametrize(
    "sizes",
    [case(1, 129, 2, 2, 2, None, (3,)), case(1, 2, 129, 2, 2, None, (3,)), case(1, 64, 1, 1, 2, None, (1,) * 64)],
    ids=["value_dim", "key_dim", "heads"],
)
def test_sizes_that_others_do_not_take(device, backend, sizes):
    """And the longest chain, through all heads."""
    check_against_float64(OPERATOR, sizes, torch.float32, "first", backend, device)
