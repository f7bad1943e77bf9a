"""cascaded_group_attention where tests/conformance does not reach: windows, sizes around its micro-kernels, extremes.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from refused import refused
from same import assert_same
from specified import check_against_float64, mapped, named
from swept import swept
from torch.nn import functional

from effattn import cascaded_group_attention
from effattn.ops import OPERATORS
from effattn.testing import ORDERS, make_arguments
from effattn.tolerance import check_against

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise, pytest.mark.usefixtures("poisoned_allocations")]

OPERATOR = OPERATORS["cascaded_group_attention"]


def sizes(batch, channels, key_dim, height, width, window=None, kernels=(5,), biases=True):
    """``window`` is a number for square ones, or None for the whole image."""
    rows, cols = (height, width) if window is None else (window, window) if isinstance(window, int) else window
    case = {"B": batch, "heads": len(kernels), "d": channels // len(kernels), "key_dim": key_dim, "k": kernels}
    case |= {"H": height, "W": width, "window_height": rows, "window_width": cols, "scale": key_dim**-0.5}
    return case | ({} if biases else {"without": ("qkv_biases", "q_dw_biases")})


CASES = [
    sizes(2, 128, 16, 14, 14, 7, (7, 5, 3, 3)),  # m4 stage 1
    sizes(1, 256, 16, 7, 7, None, (7, 5, 3, 3)),
    sizes(2, 192, 16, 4, 4, None, (7, 5, 3)),  # kernels larger than the window
    sizes(1, 12, 5, 9, 11, (4, 3), (3, 9), biases=False),  # windows that do not divide the image
    sizes(3, 8, 4, 5, 6, 1, (3, 3)),  # windows of one token
    sizes(2, 7, 3, 5, 4, 7, (5,)),  # one head; a window larger than the image
    sizes(7, 30, 8, 10, 9, (3, 5), (1, 3, 5, 7, 9)),  # more windows than parts of sums
]


@pytest.mark.parametrize("dtype", OPERATOR.dtypes, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_sizes(isa, case, order, dtype):
    check_against_float64(OPERATOR, case, dtype, order)


@pytest.mark.remainders
def test_every_number_of_heads(isa):
    for heads in range(1, 10):
        check_against_float64(OPERATOR, sizes(1, 4 * heads, 4, 5, 6, 3, (3,) * heads))


@pytest.mark.remainders
def test_every_window_and_key_dim(isa):
    for window in itertools.product((1, 2, 3, 7), (1, 2, 5, 8)):
        check_against_float64(OPERATOR, sizes(1, 8, 4, 7, 8, window, (3, 5)))
    for key_dim in swept(isa, 31, 32, vectors=1):
        check_against_float64(OPERATOR, sizes(1, 8, key_dim, 4, 4, None, (3, 5)))
    for value_dim in swept(isa, 96, 112, vectors=1):
        check_against_float64(OPERATOR, sizes(1, 2 * value_dim, 4, 4, 4, None, (3, 5)))


def test_equal_logits_are_averages(isa):
    """Of a window's values, head after head: q is zero, and the bias as large as it likes."""
    x, qkv, qkv_biases, dw, dw_biases, bias, *options = make_arguments(OPERATOR, sizes(2, 12, 4, 6, 10, (3, 5), (3, 5)))
    dw, dw_biases = mapped(torch.zeros_like, (dw, dw_biases))
    bias.fill_(1e4)

    def average():
        windows = x.double().unflatten(3, (2, 5)).unflatten(2, (2, 3))
        outs = []
        for i, group in enumerate(windows.chunk(2, dim=1)):
            feat = group if i == 0 else group + outs[-1]
            weight, qkv_bias = (t[i].double()[8:] for t in (qkv, qkv_biases))
            v = torch.einsum("oc,bcyixj->boyixj", weight.flatten(1), feat) + qkv_bias.reshape(-1, 1, 1, 1, 1)
            outs.append(v.mean(dim=(3, 5), keepdim=True).expand_as(v))
        return {"out": torch.cat(outs, dim=1).flatten(4, 5).flatten(2, 3)}

    check_against(average, {"out": OPERATOR(x, qkv, qkv_biases, dw, dw_biases, bias, *options)}, 15)


@pytest.mark.parametrize("order", ["first", "second"])
def test_float16_logits_of_1e4(isa, order):
    def change(arguments):
        arguments[0] = arguments[0] * 300
        x, (weight, *_), (bias, *_), (dw, *_), (dw_bias, *_) = mapped(torch.Tensor.double, arguments[:5])
        qkv = functional.conv2d(x[:, :16], weight, bias)
        q, k = qkv[:, :16], qkv[:, 16:32].flatten(2)
        q = functional.conv2d(q, dw, dw_bias, padding=1, groups=16).flatten(2)
        logits = 0.25 * q.mT @ k
        assert logits.max() > 1e4 and logits.min() < -1e4

    case = sizes(1, 32, 16, 7, 7, None, (3, 5))
    results = check_against_float64(OPERATOR, case, torch.float16, order, change=change)
    assert all(result.isfinite().all() for result in results.values())


def test_windows_are_images_of_their_own():
    """In float64, with windows that divide the image: what the kernels do by index arithmetic, by hand."""
    x, *rest = mapped(torch.Tensor.double, make_arguments(OPERATOR, sizes(2, 8, 4, 6, 8, (3, 4), (3, 5))))
    windows = x.unflatten(2, (2, 3)).unflatten(4, (2, 4))
    expected = torch.empty_like(windows)
    for i, j in itertools.product(range(2), range(2)):
        expected[:, :, i, :, j] = OPERATOR(windows[:, :, i, :, j], *rest)
    assert_same(OPERATOR(x, *rest), expected.flatten(4, 5).flatten(2, 3))


def test_scale_and_window_by_default():
    *arguments, _, _, _ = make_arguments(OPERATOR, sizes(1, 8, 4, 6, 6, 3, (3, 5)))
    out = cascaded_group_attention(*arguments, window_size=3)
    assert torch.equal(out, cascaded_group_attention(*arguments, scale=0.5, window_size=(3, 3)))
    *arguments, _, _, _ = make_arguments(OPERATOR, sizes(1, 8, 4, 5, 6, None, (3, 5)))
    assert torch.equal(cascaded_group_attention(*arguments), cascaded_group_attention(*arguments, window_size=(5, 6)))


# --- wrong arguments ------------------------------------------------------------------------------------------


GIVEN = named(OPERATOR, sizes(2, 8, 4, 5, 6, 3, (3, 5)))
X = GIVEN["x"]


def cascade(scale=None, window_size=3, **changed):
    *arguments, _, _, _ = (GIVEN | changed).values()
    return lambda: cascaded_group_attention(*arguments, scale=scale, window_size=window_size)


WRONG = {
    "no heads": (cascade(qkv_weights=[]), ValueError, "qkv_weights: expected at least one tensor, got none"),
    "kernels": (
        cascade(q_dw_weights=[torch.ones(4, 1, 3, 3)]),
        ValueError,
        "q_dw_weights: expected heads = 2 tensors, got 1",
    ),
    "groups": (
        cascade(x=X[:, :7]),
        ValueError,
        "x: expected shape (B, heads * d, H, W) with B = 2, heads = 2, d = 4, H = 5, W = 6, got (2, 7, 5, 6)",
    ),
    "attention_bias": (
        cascade(attention_bias=torch.ones(2, 4, 4)),
        ValueError,
        "attention_bias: expected shape (heads, window_height * window_width, window_height * window_width) with "
        "heads = 2, window_height = 3, window_width = 3, got (2, 4, 4)",
    ),
    "window": (cascade(window_size=0), ValueError, "window_height: expected an int >= 1 and <= 32767, got 0"),
    "window huge": (cascade(window_size=(2**62, 4)), ValueError, "window_height: expected an int >= 1 and <= 32767"),
    "window float": (
        cascade(window_size=3.0),
        TypeError,
        "window_size: expected an int, two of them or None, got 3.0",
    ),
    "window of a truth": (cascade(window_size=True), TypeError, "window_size: expected an int, two of them"),
    "window of a tensor": (cascade(window_size=torch.tensor(3)), TypeError, "window_size: expected an int, two"),
    "window of floats": (cascade(window_size=[2, 2.5]), TypeError, "window_size: expected an int, two of them or None"),
    "window of text": (cascade(window_size="22"), TypeError, "window_size: expected an int, two of them or None"),
    "window of three": (
        cascade(window_size=(3, 3, 3)),
        ValueError,
        "window_size: expected an int, two of them or None",
    ),
    "scale beyond float32": (cascade(scale=-1e39), ValueError, "scale: expected a finite float32, got -1e+39"),
    "scale": (cascade(scale=float("nan")), ValueError, "scale: expected a finite float32, got nan"),
}


test_what_the_function_says = refused(WRONG)
