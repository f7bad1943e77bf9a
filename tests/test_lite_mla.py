"""The operator behind LiteMLA's inference: against float64, on every instruction set; bad arguments.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import pytest
import torch

from effattn import use_backend
from effattn.ops.lite_mla import Weights, lite_mla
from effattn.testing import FLOAT32_FORWARD_TOLERANCE, MultiScaleCase, allowed_error, error, make_tensor

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise]

OP = torch.ops.effattn.lite_mla
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IN, OUT = 20, 37  # neither a multiple of what a thread or a register block takes

CASES = [
    MultiScaleCase(1, 2, 16, 14, 14),
    MultiScaleCase(2, 3, 8, 7, 7, biases=True),
    MultiScaleCase(1, 2, 5, 9, 11, kernels=(3, 5, 7), biases=True),
    MultiScaleCase(2, 1, 4, 1, 3),  # fewer tokens than a vector has lanes
    MultiScaleCase(1, 1, 8, 40, 33),  # several strips
    MultiScaleCase(1, 2, 8, 6, 6, kernels=()),
]


def arguments(case, dtype=torch.float32, memory_format="nchw"):
    """All of the operator's, in its order; weights of a size that keeps activations where they are."""
    inputs = case.inputs()
    heads_out = (1 + len(case.kernels)) * case.heads * case.head_dim
    shape = MultiScaleCase(case.batch, 1, IN, case.height, case.width)
    x = shape.inputs(dtype, memory_format)["qkv"][:, :IN]
    biases = [make_tensor(1, n, seed=6)[0] if case.biases else None for n in (case.channels, OUT)]
    return [
        x,
        make_tensor(case.channels, IN, seed=7) / IN**0.5,
        biases[0],
        inputs["dw_weights"],
        inputs["pw_weights"],
        inputs["dw_biases"],
        inputs["pw_biases"],
        make_tensor(OUT, heads_out, seed=8) / heads_out**0.5,
        biases[1],
        case.head_dim,
        1e-15,
    ]


def call(values):
    x, *weights, head_dim, eps = values
    return lite_mla(x, Weights(*weights), head_dim, eps)


def in_dtype(values, dtype):
    def convert(value):
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    return [convert(value) for value in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", ["nchw", "channels_last", "crop"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.remainders
def test_against_float64(isa, case, memory_format, dtype):
    values = arguments(case, dtype, memory_format)
    with use_backend("reference"):
        truth = call(in_dtype(values, torch.float64))
        plain = call(values)
    with use_backend("cpu"):
        out = call(values)
    assert out.dtype == dtype and out.shape == truth.shape
    assert error(out, truth) <= allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)


def test_memory_format_is_kept(isa):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        values = arguments(CASES[1])
        values[0] = values[0].contiguous(memory_format=memory_format)
        assert call(values).is_contiguous(memory_format=memory_format)


def test_same_bits_for_every_thread_count(isa, threads):
    for case in (CASES[0], CASES[4]):
        for memory_format in ("nchw", "channels_last"):
            values = arguments(case, memory_format=memory_format)
            torch.set_num_threads(1)
            expected = call(values)
            for count in (2, 3, 7):
                torch.set_num_threads(count)
                assert torch.equal(call(values), expected)


@pytest.mark.parametrize("size", [(0, 2, 7, 7), (2, 2, 0, 7), (2, 2, 7, 0), (2, 0, 7, 7)], ids=str)
def test_empty(isa, size):
    batch, heads, height, width = size
    out = call(arguments(MultiScaleCase(batch, heads, 8, height, width)))
    assert out.shape == (batch, OUT, height, width)
    assert not out.any(), "without heads there is nothing to project"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_come_out_as_in_the_reference(isa, value):
    values = arguments(MultiScaleCase(2, 2, 16, 14, 14))
    values[0][0, 3, 5, 6] = value
    with use_backend("reference"):
        expected = call(values)
    out = call(values)
    assert torch.equal(out.isfinite(), expected.isfinite()) and torch.equal(out.isnan(), expected.isnan())
    assert out[1].isfinite().all() and not out[0].isfinite().any()


def test_opcheck():
    for case in (CASES[2], MultiScaleCase(0, 1, 4, 3, 3), CASES[5]):
        x, *rest = arguments(case)
        torch.library.opcheck(OP.default, (x.clone(memory_format=torch.contiguous_format), *rest))


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
    "eps below zero": (10, -1.0, "eps: expected a finite number >= 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    position, value, message = WRONG[name]
    values = arguments(MultiScaleCase(2, 3, 8, 7, 7, biases=True))
    values[position] = value
    with pytest.raises(RuntimeError, match=message):
        OP(*values)
