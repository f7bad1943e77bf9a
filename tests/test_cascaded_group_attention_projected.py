"""The operator behind the inference of cascades, whose weights are packed: against float64; bad arguments.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import pytest
import torch
from specified import mapped

from effattn.ops import OPERATORS
from effattn.ops import cascaded_group_attention_projected as cascade_op
from effattn.testing import ORDERS, make_arguments, make_image, make_tensor
from effattn.tolerance import check_against

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise]

OPERATOR = OPERATORS["cascaded_group_attention"]
OP = torch.ops.effattn.cascaded_group_attention_projected
OUT = 37  # no multiple of what a block takes


def sizes(batch, channels, key_dim, height, width, window, kernels):
    case = {"B": batch, "heads": len(kernels), "d": channels // len(kernels), "key_dim": key_dim, "k": kernels}
    rows, cols = window
    return case | {"H": height, "W": width, "window_height": rows, "window_width": cols, "scale": 0.25}


CASES = {
    "windows": sizes(2, 24, 6, 5, 7, (4, 4), (7, 3)),
    "one window": sizes(1, 64, 16, 7, 7, (7, 7), (7, 5, 3, 3)),
    "9x9": sizes(1, 10, 4, 3, 4, (2, 5), (9,)),
    "one token": sizes(2, 8, 4, 3, 3, (1, 1), (3, 5)),
}


def made(case, dtype=torch.float32, order="first"):
    """The image, packed weights, and options."""
    x, *weights, scale, height, width = make_arguments(OPERATOR, case, dtype, order)
    proj = make_tensor(OUT, x.shape[1], seed=70) / x.shape[1] ** 0.5, make_tensor(1, OUT, seed=71)[0]
    return x, cascade_op.pack(cascade_op.Weights(*weights, *proj)), (scale, height, width)


def check_against_float64(case, dtype=torch.float32, order="first", change=lambda x: x):
    x, weights, options = made(case, dtype, order)
    x = change(x)
    wide = cascade_op.Packed(*mapped(torch.Tensor.double, weights))
    longest_sum = max(OPERATOR.longest_sum(case), x.shape[1])
    out = cascade_op.projected(x, weights, *options)
    assert out.dtype == dtype
    check_against(lambda: {"out": cascade_op.projected(x.double(), wide, *options)}, {"out": out}, longest_sum)


@pytest.mark.parametrize("dtype", OPERATOR.dtypes, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.remainders
def test_against_float64(isa, name, order, dtype):
    check_against_float64(CASES[name], dtype, order)


@pytest.mark.parametrize("memory_format", ["channel slice", "transposed", "equal rows", "equal columns"])
def test_images_however_they_lie(isa, memory_format):
    case = CASES["windows"]
    check_against_float64(case, change=lambda x: make_image(*x.shape, memory_format))
    x, weights, options = made(case)
    x = make_image(*x.shape, memory_format)
    out = cascade_op.projected(x, weights, *options)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = cascade_op.projected(mode.from_tensor(x), weights, *options)
    assert (fake.shape, fake.stride()) == (out.shape, out.stride())


@pytest.mark.parametrize("dtype", OPERATOR.dtypes, ids=str)
def test_logits_of_1e4(isa, dtype):
    """Of images that are so large: only differences to the largest logit may be taken."""
    check_against_float64(CASES["one window"], dtype, change=lambda x: x * 500)


#: Images of each case of which all windows together are work for seven threads (kMinWorkPerThread).
BATCHES = {"windows": 10, "one window": 7, "9x9": 84, "one token": 600}


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_same_bits_for_every_number_of_threads(isa, threads, order):
    for name, case in CASES.items():
        x, weights, options = made({**case, "B": BATCHES[name]}, order=order)
        outs = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            outs.append(cascade_op.projected(x, weights, *options))
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("size", [(0, 7, 7), (2, 0, 7), (2, 7, 0)], ids=str)
def test_empty(isa, size):
    batch, height, width = size
    x, weights, options = made({**CASES["windows"], "B": batch, "H": height, "W": width})
    assert cascade_op.projected(x, weights, *options).shape == (batch, OUT, height, width)


@pytest.mark.registration
def test_opcheck():
    x, weights, options = made(CASES["windows"], order="second")
    torch.library.opcheck(OP.default, (x, *weights, *options))


WRONG = {
    "x rank": ("x", torch.ones(2, 24, 7), "x: expected 4 dimensions"),
    "x channels": ("x", torch.ones(2, 25, 5, 7), "multiple of 2 channels"),
    "qkv": ("qkv", torch.ones(2, 12, 47), r"qkv: expected shape \(2, 12, 48\)"),
    "taps": ("taps", torch.ones(57, 16), r"taps: expected shape \(58, 16\)"),
    "tap_bias": ("tap_bias", torch.ones(2, 6), "tap_bias: expected shape"),
    "bias": ("bias", torch.ones(2, 16, 15), "attention_bias: expected shape"),
    "proj": ("proj", torch.ones(1, 24, 32), r"proj: expected shape \(2, 24, 32\)"),
    "proj_bias": ("proj_bias", torch.ones(1, 37), "proj_bias: expected 1 dimension"),
    "no heads": ("kernels", [], "kernels, key_dim: expected a size a head"),
    "even kernel": ("kernels", [7, 4], "kernels: expected odd sizes, got 4"),
    "huge kernel": ("kernels", [7, 2**62 + 1], "kernels: expected odd sizes"),
    "key_dim": ("key_dim", 0, "key_dim: expected"),
    "window": ("window_height", 0, "window_height, window_width: expected positive numbers below 32768, got 0 and 4"),
    "huge window": ("window_height", 2**62, "window_height, window_width: expected positive"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    x, weights, _ = made(CASES["windows"])
    arguments = {"x": x, **weights._asdict(), "scale": 0.3, "window_height": 4, "window_width": 4}
    key, value, message = WRONG[name]
    arguments[key] = value
    with pytest.raises(RuntimeError, match=message):
        OP(*arguments.values())
