"""The operator behind LiteMLA's inference: against float64, on every instruction set; bad arguments.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import pytest
import torch
from specified import mapped

from effattn import use_backend
from effattn.ops import INFERENCE_OPERATORS
from effattn.ops.lite_mla import Weights, lite_mla
from effattn.testing import ORDERS, make_arguments
from effattn.tolerance import check_against

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise]

OP = torch.ops.effattn.lite_mla
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IN, OUT = 20, 37  # neither a multiple of what a thread or a register block takes


def sizes(batch, heads, head_dim, height, width, kernels=(5,), biases=False):
    case = {"B": batch, "C": IN, "C_out": OUT, "heads": heads, "head_dim": head_dim, "H": height, "W": width}
    case |= {"S": len(kernels), "k": kernels, "eps": 1e-15}
    return case | ({} if biases else {"without": ("qkv_bias", "dw_biases", "pw_biases", "proj_bias")})


CASES = [
    sizes(1, 2, 16, 14, 14),
    sizes(2, 3, 8, 7, 7, biases=True),
    sizes(1, 2, 5, 9, 11, kernels=(3, 5, 7), biases=True),
    sizes(2, 1, 4, 1, 3),  # fewer tokens than a vector has lanes
    sizes(1, 1, 8, 40, 33),  # several strips
    sizes(1, 2, 8, 6, 6, kernels=()),
]


def arguments(case, dtype=torch.float32, order="first"):
    return make_arguments(INFERENCE_OPERATORS["lite_mla"], case, dtype, order)


def call(values):
    x, *weights, head_dim, eps = values
    return lite_mla(x, Weights(*weights), head_dim, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.remainders
def test_against_float64(isa, case, order, dtype):
    values = arguments(case, dtype, order)
    wide = mapped(torch.Tensor.double, values)
    out = call(values)
    assert out.dtype == dtype
    check_against(lambda: {"out": call(wide)}, {"out": out}, max(IN, case["H"] * case["W"]))


def test_memory_format_is_kept(isa):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        values = arguments(CASES[1])
        values[0] = values[0].contiguous(memory_format=memory_format)
        assert call(values).is_contiguous(memory_format=memory_format)


def test_same_bits_for_every_thread_count(isa, threads):
    for case in (CASES[0], CASES[4]):
        for order in ("first", "second"):
            values = arguments(case, order=order)
            torch.set_num_threads(1)
            expected = call(values)
            for count in (2, 3, 7):
                torch.set_num_threads(count)
                assert torch.equal(call(values), expected)


@pytest.mark.parametrize("size", [(0, 2, 7, 7), (2, 2, 0, 7), (2, 2, 7, 0), (2, 0, 7, 7)], ids=str)
def test_empty(isa, size):
    batch, heads, height, width = size
    out = call(arguments(sizes(batch, heads, 8, height, width)))
    assert out.shape == (batch, OUT, height, width)
    assert not out.any(), "without heads there is nothing to project"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_come_out_as_in_the_reference(isa, value):
    values = arguments(sizes(2, 2, 16, 14, 14))
    values[0][0, 3, 5, 6] = value
    with use_backend("reference"):
        expected = call(values)
    out = call(values)
    assert torch.equal(out.isfinite(), expected.isfinite()) and torch.equal(out.isnan(), expected.isnan())
    assert out[1].isfinite().all() and not out[0].isfinite().any()


@pytest.mark.registration
def test_opcheck():
    for case in (CASES[2], sizes(0, 1, 4, 3, 3), CASES[5]):
        torch.library.opcheck(OP.default, arguments(case))


WRONG = {
    "x of 3 dimensions": (0, torch.ones(IN, 7, 7), "x: expected 4 dimensions"),
    "x of integers": (0, torch.ones(1, IN, 7, 7, dtype=torch.int32), "x: expected float32, bfloat16 or float16"),
    "x of other channels": (0, torch.ones(1, IN + 1, 7, 7), r"qkv_weight: expected shape .* C = 21"),
    "qkv_weight of 4 dimensions": (1, torch.ones(72, IN, 1, 1), "qkv_weight: expected 2 dimensions"),
    "qkv_weight that head_dim does not divide": (
        1,
        torch.ones(70, IN),
        r"qkv_weight: expected shape \(3 \* heads \* head_dim, C\)",
    ),
    "qkv_weight in float64": (1, torch.ones(72, IN).double(), "qkv_weight: expected float32"),
    "qkv_bias too long": (2, torch.ones(73), r"qkv_bias: expected shape"),
    "an even kernel": (3, [torch.ones(72, 1, 4, 4)], "odd k"),
    "a pointwise weight missing": (4, [], "pw_weights: expected S = 1 tensors"),
    "proj_weight of other inputs": (7, torch.ones(OUT, 47), r"proj_weight: expected shape"),
    "proj_bias too short": (8, torch.ones(OUT - 1), r"proj_bias: expected shape"),
    "head_dim of zero": (9, 0, "head_dim: expected an int >= 1"),
    "eps below zero": (10, -1.0, "eps: expected a finite float32 >= 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    position, value, message = WRONG[name]
    values = arguments(sizes(2, 3, 8, 7, 7, biases=True))
    values[position] = value
    with pytest.raises(RuntimeError, match=message):
        OP(*values)
    if values[0].is_floating_point():  # else no kernel is asked
        with pytest.raises((TypeError, ValueError), match=message):
            INFERENCE_OPERATORS["lite_mla"](*values)
