"""biased_attention on GPUs, as its kernels are made, with and without talking heads: tiles, parts, masks, extremes."""

from __future__ import annotations

import pytest
import torch
from cuda_only import SCALARS, cuda_only, workspace_of_inference
from limits import check_that_a_limit_is_named
from same import assert_same
from specified import check_against_float64, expected, mapped, with_gradients
from tiers import full

from effattn.ops import OPERATORS
from effattn.testing import ORDERS, make_arguments
from effattn.tolerance import GPU_ROUNDINGS, error

pytestmark = [pytest.mark.each_value, pytest.mark.usefixtures("device", "poisoned_allocations")]

OPERATOR = OPERATORS["biased_attention"]
NARROW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *NARROW)
talking_or_not = pytest.mark.parametrize("talking", [False, True], ids=["", "talking"])


def case(batch, heads, queries, keys, head_dim, value_dim, talking=False):
    return {
        **{"B": batch, "heads": heads, "N": queries, "M": keys, "D": head_dim, "Dv": value_dim},
        **{"scale": head_dim**-0.5, "without": () if talking else ("talking_heads",)},
    }


CASES = {
    "fewer queries than keys": case(2, 2, 13, 49, 16, 64),
    "talking": case(1, 3, 17, 33, 5, 7, talking=True),
    "blocks of queries and keys": case(1, 1, 70, 100, 8, 20),
    "talking, blocks of keys": case(1, 3, 17, 70, 33, 20, talking=True),
    "wide heads": case(3, 1, 4, 5, 128, 8, talking=True),
    "one of each": case(1, 1, 1, 1, 1, 1),
    "odd channels": case(1, 2, 33, 35, 17, 13),
    "wide values": case(1, 1, 20, 49, 7, 128),
    "talking, wide values": case(1, 2, 17, 20, 5, 128, talking=True),
    "inner sizes of the gradients in parts": case(1, 1, 50, 150, 128, 16),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.numerics
def test_sizes_around_tiles(device, backend, name, order, dtype):
    check_against_float64(OPERATOR, CASES[name], dtype, order, backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.numerics
def test_more_keys_than_are_summed_up_in_one_chain(device, backend, dtype):
    check_against_float64(OPERATOR, case(1, 1, 2, 1300, 4, 8), dtype, "first", backend, device)


@cuda_only
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("order", ("second", "gaps"))
@talking_or_not
@pytest.mark.numerics
def test_layouts_of_narrow_types(device, backend, order, dtype, talking):
    """Rows of whole vectors, and rows that are not."""
    sizes = case(1, 2, 9, 21, 8, 12, True) if talking else case(2, 2, 24, 40, 16, 24)
    check_against_float64(OPERATOR, sizes, dtype, order, backend, device)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4], ids=str)
def test_views_that_are_not_aligned(device, dtype, offset):
    """Tensors that begin `offset` elements behind 16 bytes, and rows that do: of the same values the same results."""
    arguments = mapped(lambda t: t.to(device), make_arguments(OPERATOR, case(1, 2, 20, 35, 16, 24), dtype))

    def shifted(t):
        memory = t.new_empty(*t.shape[:-1], t.shape[-1] + 2 * offset)
        return memory[..., offset:-offset].copy_(t)

    aligned, unaligned = (
        with_gradients(OPERATOR, OPERATOR, [*images, *arguments[3:]], dtype)
        for images in (arguments[:3], [shifted(t) for t in arguments[:3]])
    )
    assert all(torch.equal(result, unaligned[name]) for name, result in aligned.items())


@pytest.mark.memcheck
@pytest.mark.parametrize("heads", [1, 2, 7, 9, full(17), 33])
def test_numbers_of_talking_heads(device, backend, heads):
    check_against_float64(OPERATOR, case(1, heads, 2, 18, 4, 8, True), torch.float32, "first", backend, device)


@talking_or_not
def test_bias_over_more_images_than_are_added_up_at_once(device, backend, talking, monkeypatch):
    monkeypatch.setattr("effattn._triton.reduction.ROWS_ADDED_UP", 4)
    check_against_float64(OPERATOR, case(11, 1, 3, 4, 4, 4, talking), torch.float32, "first", backend, device)


@talking_or_not
def test_float16_logits_of_1e4(device, backend, talking):
    """e^1e4 is infinite in every type: only differences to the largest logit may be taken."""

    def change(arguments):
        arguments[0] = arguments[0] * 2e3

    sizes = case(1, 2, 33, 49, 32, 32, talking)
    check_against_float64(OPERATOR, sizes, torch.float16, "first", backend, device, change)


@talking_or_not
def test_bias_of_minus_infinity_masks(device, talking):
    """Whole blocks of keys, from the first on; and all keys of a query, of which nothing is left but NaN."""
    sizes = case(1, 2, 9, 100, 8, 16, talking)
    q, k, v, bias, mixing, scale = mapped(lambda t: t.to(device), make_arguments(OPERATOR, sizes))
    masked = bias.clone()
    masked[:, :, :70] = -torch.inf
    if talking:  # that keep heads apart: infinity times 0 is no number
        eye, zero = torch.eye(2, device=device), torch.zeros(2, device=device)
        masked[:, :, :70] = -1e30
        mixing = [eye, zero, eye, zero]
    out = OPERATOR(q, k, v, masked, mixing, scale)
    short = OPERATOR(q, k[:, :, 70:], v[:, :, 70:], bias[:, :, 70:], mixing, scale)
    assert_same(out, short)
    if not talking:
        masked[1, 3] = -torch.inf
        is_nan = OPERATOR(q, k, v, masked, mixing, scale).isnan()
        assert is_nan[:, 1, 3].all() and is_nan.sum() == 16


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_weights_that_float16_does_not_hold(device, dtype):
    """Mixing makes them larger than 65504; products with small values are in range, gradients of values are not."""

    def change(arguments):
        arguments[2] = arguments[2] * 1e-3
        arguments[4][2] = arguments[4][2] * 1e6

    sizes = case(1, 2, 20, 35, 8, 16, True)
    arguments, truth, allowed = expected(OPERATOR, sizes, dtype, roundings=GPU_ROUNDINGS, change=change)
    out = OPERATOR(*mapped(lambda t: t.to(device), arguments))
    assert error(out.cpu(), truth["out"]) <= allowed["out"]


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        (case(1, 1, 2, 2, 129, 2), "heads of up to 128 channels, not 129"),
        (case(1, 2, 5, 40, 8, 140), "heads of up to 128 channels, not 140"),
        (case(1, 65, 2, 2, 1, 1, True), "up to 64 talking heads, not 65"),
    ],
    ids=["head_dim", "value_dim", "heads"],
)
def test_a_limit_is_named_or_there_is_none(device, backend, sizes, limit):
    if backend == "cuda":
        check_against_float64(OPERATOR, sizes, torch.float32, "first", backend, device)
    else:
        check_that_a_limit_is_named(OPERATOR, sizes, backend, device, limit)


@cuda_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [case(1, 8, 9, 430, 4, 4, True), case(2, 1, 3, 26000, 2, 2)], ids=["heads", "keys"])
def test_logits_that_do_not_fit_into_shared_memory(device, backend, sizes, dtype):
    check_against_float64(OPERATOR, sizes, dtype, "first", backend, device)


@cuda_only
def test_many_keys_need_no_workspace(device, backend):
    arguments = mapped(lambda t: t.to(device), make_arguments(OPERATOR, case(1, 1, 64, 1024, 8, 8)))
    assert 0 <= workspace_of_inference(OPERATOR, arguments, device) <= SCALARS
