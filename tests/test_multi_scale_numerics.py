"""multi_scale_aggregation and multi_scale_linear_attention against float64.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import pytest
import torch

from effattn import _library, multi_scale_aggregation, multi_scale_linear_attention, relu_linear_attention
from effattn.testing import (
    MultiScaleCase,
    check_multi_scale,
    error,
    in_float64,
    official_multi_scale_attention,
    with_gradients,
)

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise, pytest.mark.usefixtures("poisoned_allocations")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("nchw", "channels_last", "channel slice", "crop")
FUNCTIONS = (multi_scale_aggregation, multi_scale_linear_attention)
EPS = 1e-15

both = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__.removeprefix("multi_scale_"))


def check(function, case, dtype=torch.float32, memory_format="nchw", eps=EPS):
    return check_multi_scale(function, "cpu", case, dtype, memory_format, eps)


CASES = [
    MultiScaleCase(2, 2, 16, 14, 14),
    MultiScaleCase(1, 3, 16, 7, 7, biases=True),
    MultiScaleCase(1, 1, 8, 33, 37, kernels=(3, 5, 7), biases=True),
    MultiScaleCase(2, 1, 13, 20, 19, kernels=(7,)),
    MultiScaleCase(1, 2, 33, 10, 24, kernels=(3,), biases=True),
    MultiScaleCase(1, 1, 4, 5, 600),  # strips of the fewest rows
    MultiScaleCase(1, 1, 8, 70, 16, kernels=(9, 1)),  # other sizes of kernels; several strips
]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(isa, function, case, memory_format, dtype):
    check(function, case, dtype, memory_format)


def test_the_cases_meet_what_a_plan_can_hold(isa):
    """One strip and several, rows that fill a block of the convolution and rows that do not."""
    rows = {}
    for case in CASES:
        plan = _library._C.multi_scale_plan(
            batch=case.batch,
            heads=case.heads,
            head_dim=case.head_dim,
            height=case.height,
            width=case.width,
            kernels=case.kernels,
        )
        assert plan["isa"] == isa
        assert 0 < plan["scratch_floats"] < plan["scratch_floats_backward"]
        assert plan["flops_aggregation"] == 2 * case.batch * case.channels * case.height * case.width * sum(
            k * k + case.head_dim for k in case.kernels
        )
        rows[case] = plan["rows"]
    assert any(rows[case] < case.height for case in CASES) and any(rows[case] == case.height for case in CASES)
    assert any(count % 8 == 0 for count in rows.values()) and any(count % 8 for count in rows.values())


@both
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.remainders
def test_every_width_and_height(isa, function, kernel):
    """Around a vector, a block of rows and the kernel itself."""
    for width in range(1, 36):
        check(function, MultiScaleCase(1, 1, 3, 3, width, kernels=(kernel,)))
    for height in range(1, 20):
        check(function, MultiScaleCase(1, 1, 3, height, 5, kernels=(kernel,)))


@both
@pytest.mark.parametrize("memory_format", FORMATS[:2])
@pytest.mark.remainders
def test_every_head_dim(isa, function, memory_format):
    for head_dim in (*range(1, 18), 24, 31, 32, 33):
        check(function, MultiScaleCase(1, 1, head_dim, 4, 5, kernels=(3,)), memory_format=memory_format)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.remainders
def test_images_smaller_than_the_kernel(isa, function, height, width, dtype):
    check(function, MultiScaleCase(2, 1, 8, height, width, kernels=(5,), biases=True), dtype)


@both
@pytest.mark.parametrize("size", [(0, 2, 7, 7), (2, 2, 0, 7), (2, 2, 7, 0), (2, 0, 7, 7)], ids=str)
def test_empty(isa, function, size):
    batch, heads, height, width = size
    case = MultiScaleCase(batch, heads, 8, height, width, biases=True)
    results = with_gradients(function, "cpu", case, case.inputs(), torch.float32)
    for name, result in results.items():
        assert torch.equal(result, torch.zeros_like(result)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_qkv_itself_comes_first(isa, memory_format, dtype):
    case = MultiScaleCase(2, 2, 8, 9, 11)
    inputs = case.inputs(dtype, memory_format)
    out = case.call(multi_scale_aggregation, inputs)
    assert torch.equal(out[:, : case.channels], inputs["qkv"])


def test_without_scales_it_is_relu_linear_attention(isa):
    case = MultiScaleCase(2, 3, 16, 14, 14, kernels=())
    inputs = case.inputs()
    heads = inputs["qkv"].reshape(2, 3, 48, 196).mT
    expected = relu_linear_attention(*heads.chunk(3, dim=-1)).mT.reshape(2, 48, 14, 14)
    assert torch.equal(case.call(multi_scale_linear_attention, inputs), expected)
    assert torch.equal(case.call(multi_scale_aggregation, inputs), inputs["qkv"])


@both
@pytest.mark.parametrize("memory_format", FORMATS[:2])
def test_memory_format_is_kept(isa, function, memory_format):
    case = MultiScaleCase(2, 2, 8, 9, 11)
    results = with_gradients(function, "cpu", case, case.inputs(memory_format=memory_format), torch.float32)
    expected = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    assert results["out"].is_contiguous(memory_format=expected)
    assert results["grad qkv"].is_contiguous(memory_format=expected)


@pytest.mark.parametrize("memory_format", FORMATS[:2])
def test_float16_activations_of_1e4(isa, memory_format):
    """The official formulation overflows in float16: its sums reach 1e10."""
    case = MultiScaleCase(1, 1, 16, 48, 50, scale=1e4)
    inputs = case.inputs(torch.float16, memory_format)
    assert inputs["qkv"].abs().max() > 3e4
    results = check(multi_scale_linear_attention, case, torch.float16, memory_format)
    assert all(result.isfinite().all() for result in results.values())
    plain = official_multi_scale_attention(case, inputs, upcast=False)
    assert not plain.isfinite().all()


def test_weights_of_the_narrow_type(isa):
    """Their gradients come back in their own dtype."""
    case = MultiScaleCase(1, 2, 8, 9, 11, biases=True)
    inputs = case.inputs(torch.bfloat16)
    for name in ("dw_weights", "pw_weights", "dw_biases", "pw_biases"):
        inputs[name] = [w.bfloat16() for w in inputs[name]]
    results = with_gradients(multi_scale_linear_attention, "cpu", case, inputs, torch.bfloat16)
    truth = with_gradients(multi_scale_linear_attention, "reference", case, inputs, torch.float64)
    for name, result in results.items():
        assert result.dtype == torch.bfloat16, name
        # Rounded once from float32: half a unit in the last place of each element, and what float32 itself is off.
        assert error(result, truth[name]) <= 2.0**-8 * truth[name].norm(), name


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory_format", FORMATS[:2])
def test_nan_and_inf_come_out_as_in_the_reference(isa, function, value, memory_format):
    case = MultiScaleCase(2, 2, 16, 12, 20)
    inputs = case.inputs(memory_format=memory_format)
    inputs["qkv"][0, 5, 6, 19] = value
    expected = with_gradients(function, "reference", case, inputs, torch.float32)
    results = with_gradients(function, "cpu", case, inputs, torch.float32)
    for name in ("out", "grad qkv"):
        assert torch.equal(results[name].isfinite(), expected[name].isfinite()), name
    assert torch.equal(results["out"].isnan(), expected["out"].isnan())


@both
@pytest.mark.parametrize("memory_format", FORMATS[:2])
def test_same_bits_every_run_and_every_thread_count(isa, function, memory_format, threads):
    for case in (MultiScaleCase(3, 1, 8, 70, 30), MultiScaleCase(1, 5, 8, 9, 9)):
        inputs = case.inputs(memory_format=memory_format)

        def everything(case=case, inputs=inputs):
            return with_gradients(function, "cpu", case, inputs, torch.float32)

        expected = everything()
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for _ in range(2):
                for name, result in everything().items():
                    assert torch.equal(result, expected[name]), f"{name} with {count} threads"


@pytest.mark.parametrize("case", [MultiScaleCase(2, 2, 8, 9, 11), MultiScaleCase(1, 2, 16, 3, 4)], ids=str)
def test_reference_is_the_official_formulation(case):
    """In float64; the second has fewer tokens than channels, where the official code takes its quadratic path."""
    inputs = in_float64(case.inputs())
    expected = official_multi_scale_attention(case, inputs, upcast=False)
    out = case.call(multi_scale_linear_attention, inputs)
    assert torch.allclose(out, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
