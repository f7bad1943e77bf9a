"""multi_scale_aggregation and multi_scale_linear_attention where tests/conformance does not reach: sizes around their
strips and micro-kernels, images smaller than a kernel, and the official formulation.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import pytest
import torch
from refused import refused
from same import assert_same
from specified import check_against_float64, mapped, named
from swept import swept

from effattn import _library, multi_scale_aggregation, multi_scale_linear_attention, use_backend
from effattn.ops import OPERATORS
from effattn.testing import ORDERS, make_arguments, official_multi_scale_attention

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise, pytest.mark.usefixtures("poisoned_allocations")]

AGGREGATION, ATTENTION = OPERATORS["multi_scale_aggregation"], OPERATORS["multi_scale_linear_attention"]
DTYPES = ATTENTION.dtypes

both = pytest.mark.parametrize("operator", [AGGREGATION, ATTENTION], ids=["aggregation", "linear_attention"])


def sizes(batch, heads, head_dim, height, width, kernels=(5,), biases=False):
    case = {"B": batch, "heads": heads, "head_dim": head_dim, "H": height, "W": width, "S": len(kernels)}
    return case | {"k": kernels, "eps": 1e-15} | ({} if biases else {"without": ("dw_biases", "pw_biases")})


CASES = [
    sizes(2, 2, 16, 14, 14),
    sizes(1, 3, 16, 7, 7, biases=True),
    sizes(1, 1, 8, 33, 37, kernels=(3, 5, 7), biases=True),
    sizes(2, 1, 13, 20, 19, kernels=(7,)),
    sizes(1, 2, 33, 10, 24, kernels=(3,), biases=True),
    sizes(1, 1, 4, 5, 600),  # strips of the fewest rows
    sizes(1, 1, 8, 70, 16, kernels=(9, 1)),  # other sizes of kernels; several strips
]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_sizes(isa, operator, case, order, dtype):
    check_against_float64(operator, case, dtype, order)


def test_the_cases_meet_what_a_plan_can_hold(isa):
    """One strip and several, rows that fill a block of the convolution and rows that do not."""
    rows = []
    for case in CASES:
        names = {"batch": "B", "heads": "heads", "head_dim": "head_dim", "height": "H", "width": "W", "kernels": "k"}
        plan = _library._C.multi_scale_plan(**{name: case[of] for name, of in names.items()})
        assert plan["isa"] == isa
        assert 0 < plan["scratch_floats"] < plan["scratch_floats_backward"]
        rows.append((plan["rows"], case["H"]))
    assert any(count < height for count, height in rows) and any(count == height for count, height in rows)
    assert any(count % 8 == 0 for count, _ in rows) and any(count % 8 for count, _ in rows)


@both
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.remainders
def test_every_width_and_height(isa, operator, kernel):
    """Around a vector, a block of rows and the kernel itself."""
    for width in swept(isa):
        check_against_float64(operator, sizes(1, 1, 3, 3, width, (kernel,)))
    for height in swept(isa, vectors=1):
        check_against_float64(operator, sizes(1, 1, 3, height, 5, (kernel,)))


@both
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.remainders
def test_every_head_dim(isa, operator, order):
    for head_dim in swept(isa, 24, 31, 32, 33, vectors=1):
        check_against_float64(operator, sizes(1, 1, head_dim, 4, 5, (3,)), order=order)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.remainders
def test_images_smaller_than_the_kernel(isa, operator, height, width, dtype):
    check_against_float64(operator, sizes(2, 1, 8, height, width, biases=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_qkv_itself_comes_first(isa, order, dtype):
    qkv, *rest = make_arguments(AGGREGATION, sizes(2, 2, 8, 9, 11), dtype, order)
    assert torch.equal(AGGREGATION(qkv, *rest)[:, : qkv.shape[1]], qkv)


def official(qkv, dw_weights, pw_weights, dw_biases, pw_biases, dim, eps):
    return official_multi_scale_attention(qkv, dw_weights, pw_weights, dim, eps, upcast=False)


@pytest.mark.parametrize("case", [sizes(2, 2, 8, 9, 11), sizes(1, 2, 16, 3, 4)], ids=["linear", "quadratic"])
def test_the_plain_formulation_is_the_official_one(case):
    """In float64; the second has fewer tokens than channels, where the official code takes its quadratic path."""
    arguments = mapped(torch.Tensor.double, make_arguments(ATTENTION, case))
    assert_same(ATTENTION.plain(*arguments), official(*arguments))


@pytest.mark.parametrize("order", ["first", "second"])
def test_float16_activations_of_1e4(isa, order):
    """The official formulation overflows in float16: its sums reach 1e10."""
    case = sizes(1, 1, 16, 48, 50)

    def change(arguments):
        arguments[0] = (arguments[0].float() * 1e4).half()

    results = check_against_float64(ATTENTION, case, torch.float16, order, change=change)
    assert all(result.isfinite().all() for result in results.values())
    arguments = make_arguments(ATTENTION, case, torch.float16, order)
    change(arguments)
    assert arguments[0].abs().max() > 3e4 and not official(*arguments).isfinite().all()


def test_weights_of_the_narrow_type(isa):
    """Their gradients come back in their own dtype, rounded once from those of weights in float32."""
    wide = make_arguments(ATTENTION, sizes(1, 2, 8, 9, 11, biases=True), torch.bfloat16)
    wide[1:5] = [[w.bfloat16().float().requires_grad_() for w in weights] for weights in wide[1:5]]
    narrow = [wide[0], *([w.detach().bfloat16().requires_grad_() for w in weights] for weights in wide[1:5]), *wide[5:]]
    for arguments in (wide, narrow):
        ATTENTION(*arguments).float().sum().backward()
    for mine, expected in zip(narrow[1:5], wide[1:5], strict=True):
        for a, b in zip(mine, expected, strict=True):
            assert torch.equal(a.grad, b.grad.bfloat16())


# --- wrong arguments ------------------------------------------------------------------------------------------


GIVEN = named(ATTENTION, sizes(2, 2, 4, 5, 6, kernels=(3, 5), biases=True))


def scales(function=multi_scale_linear_attention, head_dim=4, options=None, **changed):
    arguments = {name: value for name, value in GIVEN.items() if name not in ("head_dim", "eps")} | changed
    return lambda: function(*arguments.values(), head_dim=head_dim, **(options or {}))


def with_element(name, element, value):
    return {name: [value if i == element else t for i, t in enumerate(GIVEN[name])]}


WRONG = {
    "channels": (
        scales(qkv=GIVEN["qkv"][:, :23]),
        ValueError,
        "qkv: expected shape (B, 3 * heads * head_dim, H, W) with B = 2, heads = 2, head_dim = 4, "
        "H = 5, W = 6, got (2, 23, 5, 6)",
    ),
    "head_dim": (scales(head_dim=0), ValueError, "head_dim: expected an int >= 1, got 0"),
    "head_dim float": (scales(head_dim=4.0), TypeError, "head_dim: expected an int, got float"),
    "scales": (
        scales(multi_scale_aggregation, pw_weights=GIVEN["pw_weights"][:1]),
        ValueError,
        "pw_weights: expected S = 2 tensors, got 1",
    ),
    "no weights": (
        scales(dw_weights=None),
        TypeError,
        "dw_weights: expected a sequence of tensors, got NoneType",
    ),
    "even kernel": (
        scales(**with_element("dw_weights", 1, torch.ones(24, 1, 4, 4))),
        ValueError,
        "dw_weights[1]: expected an odd k in (3 * heads * head_dim, 1, k, k), got shape (24, 1, 4, 4)",
    ),
    "oblong kernel": (
        scales(**with_element("dw_weights", 0, torch.ones(24, 1, 5, 3))),
        ValueError,
        "dw_weights[0]: expected shape (3 * heads * head_dim, 1, k, k) with heads = 2, head_dim = 4, k = 5, "
        "got (24, 1, 5, 3)",
    ),
    "weight dtype": (
        scales(**with_element("dw_weights", 0, torch.ones(24, 1, 3, 3).half())),
        TypeError,
        "dw_weights[0]: expected the dtype of qkv, torch.float32, or float32, got torch.float16",
    ),
    "scale eps": (scales(options={"eps": -1.0}), ValueError, "eps: expected a finite float32 >= 0, got -1.0"),
}


test_what_the_function_says = refused(WRONG)


def test_more_scales_than_the_kernels_take():
    arguments = make_arguments(AGGREGATION, sizes(1, 1, 4, 5, 6, kernels=(3,) * 9))
    assert torch.equal(AGGREGATION(*arguments), AGGREGATION.plain(*arguments))
    with use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: takes up to 8 scales, not 9"):
        AGGREGATION(*arguments)
    with pytest.raises(RuntimeError, match="multi_scale_aggregation: dw_weights: expected at most 8 scales, got 9"):
        torch.ops.effattn.multi_scale_aggregation(*arguments)
