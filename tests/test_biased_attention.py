"""biased_attention where tests/conformance does not reach: sizes around its blocks, extremes of logits and of the bias.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import pytest
import torch
from refused import refused
from same import assert_same
from specified import check_against_float64, named
from swept import swept

from effattn import biased_attention
from effattn.ops import OPERATORS
from effattn.testing import ORDERS, make_arguments

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise, pytest.mark.usefixtures("poisoned_allocations")]

OPERATOR = OPERATORS["biased_attention"]
talking_or_not = pytest.mark.parametrize("talking", [False, True], ids=["", "talking"])


def sizes(batch, heads, queries, keys, head_dim, value_dim, talking=False):
    case = {"B": batch, "heads": heads, "N": queries, "M": keys, "D": head_dim, "Dv": value_dim}
    return case | {"scale": max(head_dim, 1) ** -0.5} | ({} if talking else {"without": ("talking_heads",)})


CASES = [
    sizes(2, 8, 49, 49, 32, 128),  # EfficientFormer
    sizes(2, 8, 49, 49, 32, 128, talking=True),  # EfficientFormerV2
    sizes(1, 8, 13, 49, 16, 64),  # V2's downsampling form: fewer queries than keys
    sizes(3, 3, 17, 33, 5, 7, talking=True),
    sizes(1, 2, 300, 250, 16, 24),  # several blocks of queries
    sizes(1, 4, 70, 300, 8, 16, talking=True),
    sizes(9, 1, 4, 5, 8, 8),  # more images than parts of sums
]


@pytest.mark.parametrize("dtype", OPERATOR.dtypes, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_sizes(isa, case, order, dtype):
    check_against_float64(OPERATOR, case, dtype, order)


@talking_or_not
@pytest.mark.remainders
def test_every_number_of_tokens_and_channels(isa, talking):
    """Around vectors and blocks of rows, for each size alone."""
    for n in swept(isa, 47, 48, 49, 63, 64, 65):
        check_against_float64(OPERATOR, sizes(1, 2, n, 5, 4, 6, talking))
        check_against_float64(OPERATOR, sizes(1, 2, 5, n, 4, 6, talking))
    for n in swept(isa, 31, 32, 33, 112, vectors=1):
        check_against_float64(OPERATOR, sizes(1, 2, 5, 6, n, 4, talking))
        check_against_float64(OPERATOR, sizes(1, 2, 5, 6, 4, n, talking))


@pytest.mark.remainders
def test_every_number_of_talking_heads(isa):
    for heads in range(1, 10):
        check_against_float64(OPERATOR, sizes(1, heads, 5, 6, 4, 8, talking=True))


@talking_or_not
def test_equal_logits_are_an_average(isa, talking):
    """Softmax of anything constant, however large, with mixing of heads that keeps it constant."""
    q, k, v, bias, mixing, _ = make_arguments(OPERATOR, sizes(2, 3, 9, 35, 8, 16, talking))
    q.zero_()
    bias.fill_(1e4)
    if talking:
        mixing[2:] = [torch.eye(3), torch.zeros(3)]
    out = biased_attention(q, k, v, bias, talking_heads=mixing or None)
    assert_same(out, v.mean(dim=2, keepdim=True).expand(-1, -1, 9, -1))


@talking_or_not
@pytest.mark.parametrize("order", ORDERS)
def test_float16_logits_of_1e4(isa, order, talking):
    """e^1e4 is infinite in every type: only differences to the largest logit may be taken."""

    def change(arguments):
        q, k = arguments[0] * 2e3, arguments[1]
        logits = q.float() @ k.float().mT * arguments[-1]
        assert logits.max() > 5e3 and logits.min() < -5e3
        arguments[0] = q

    case = sizes(1, 2, 49, 49, 32, 32, talking)
    results = check_against_float64(OPERATOR, case, torch.float16, order, change=change)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_in_the_bias(isa, value):
    arguments = make_arguments(OPERATOR, sizes(2, 2, 20, 35, 8, 16))
    arguments[3][..., 3, 4] = value
    out, plain = OPERATOR(*arguments), OPERATOR.plain(*arguments)
    assert torch.equal(out.isnan(), plain.isnan()) and torch.equal(out.isinf(), plain.isinf())


def test_a_bias_of_minus_infinity_masks(isa):
    q, k, v, bias, *_ = make_arguments(OPERATOR, sizes(1, 2, 9, 40, 8, 16))
    masked = bias.clone()
    masked[:, :, 30:] = -float("inf")
    short = biased_attention(q, k[:, :, :30], v[:, :, :30], bias[:, :, :30])
    assert_same(biased_attention(q, k, v, masked), short)


def test_the_scale_by_default():
    q, k, v, bias, *_ = make_arguments(OPERATOR, sizes(2, 3, 6, 7, 4, 5))
    assert torch.equal(biased_attention(q, k, v, bias), biased_attention(q, k, v, bias, scale=0.5))
    assert not torch.allclose(biased_attention(q, k, v, bias, scale=0.0), biased_attention(q, k, v, bias))


def test_autocast_promotes_to_the_widest():
    q, k, v, bias, *_ = make_arguments(OPERATOR, sizes(2, 3, 6, 7, 4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = biased_attention(q, k, v.bfloat16(), bias)
    assert out.dtype == torch.float32
    assert torch.equal(out, biased_attention(q, k, v.bfloat16().float(), bias))


# --- wrong arguments ------------------------------------------------------------------------------------------


GIVEN = named(OPERATOR, sizes(2, 3, 5, 6, 4, 8, talking=True))


def biased(scale=None, **changed):
    *arguments, talking_heads, _ = (GIVEN | changed).values()
    return lambda: biased_attention(*arguments, scale=scale, talking_heads=talking_heads)


WRONG = {
    "bias": (
        biased(bias=torch.ones(3, 6, 5)),
        ValueError,
        "bias: expected shape (heads, N, M) with heads = 3, N = 5, M = 6, got (3, 6, 5)",
    ),
    "mixing": (
        biased(talking_heads=torch.ones(3, 3)),
        TypeError,
        "talking_heads: expected a sequence of tensors, got Tensor",
    ),
    "mixing length": (
        biased(talking_heads=[torch.ones(3, 3)]),
        ValueError,
        "talking_heads: expected none or 4 tensors, got 1",
    ),
    "scale text": (biased(scale="1"), TypeError, "scale: expected a number, got str"),
}


test_what_the_function_says = refused(WRONG)
