"""biased_attention and cascaded_group_attention against float64.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from effattn import biased_attention, cascaded_group_attention, use_backend
from effattn.testing import (
    FLOAT32_FORWARD_TOLERANCE,
    LAYOUTS,
    BiasedCase,
    CascadeCase,
    check_softmax,
    error,
    in_float64,
    with_gradients,
)

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise, pytest.mark.usefixtures("poisoned_allocations")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("nchw", "channels_last", "channel slice", "crop")
FUNCTIONS = {BiasedCase: biased_attention, CascadeCase: cascaded_group_attention}


def check(case, dtype=torch.float32, layout=None):
    return check_softmax(FUNCTIONS[type(case)], "cpu", case, dtype, layout)


BIASED = [
    BiasedCase(2, 8, 49, 49, 32, 128),  # EfficientFormer
    BiasedCase(2, 8, 49, 49, 32, 128, talking=True),  # EfficientFormerV2
    BiasedCase(1, 8, 13, 49, 16, 64),  # V2's downsampling form: fewer queries than keys
    BiasedCase(3, 3, 17, 33, 5, 7, talking=True),
    BiasedCase(1, 2, 300, 250, 16, 24),  # several blocks of queries
    BiasedCase(1, 4, 70, 300, 8, 16, talking=True),
    BiasedCase(9, 1, 4, 5, 8, 8),  # more images than parts of sums
]
CASCADES = [
    CascadeCase(2, 128, 16, 14, 14, 7, (7, 5, 3, 3)),  # m4 stage 1
    CascadeCase(1, 256, 16, 7, 7, None, (7, 5, 3, 3)),
    CascadeCase(2, 192, 16, 4, 4, None, (7, 5, 3)),  # kernels larger than the window
    CascadeCase(1, 12, 5, 9, 11, (4, 3), (3, 9), biases=False),  # windows that do not divide the image
    CascadeCase(3, 8, 4, 5, 6, 1, (3, 3)),  # windows of one token
    CascadeCase(2, 7, 3, 5, 4, 7, (5,)),  # one head; a window larger than the image
    CascadeCase(7, 30, 8, 10, 9, (3, 5), (1, 3, 5, 7, 9)),  # more windows than parts of sums
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", BIASED, ids=str)
def test_biased_attention_against_float64(isa, case, layout, dtype):
    check(case, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASCADES, ids=str)
def test_cascade_against_float64(isa, case, memory_format, dtype):
    check(case, dtype, memory_format)


@pytest.mark.parametrize("talking", [False, True], ids=["", "talking"])
@pytest.mark.remainders
def test_every_number_of_tokens_and_channels(isa, talking):
    """Around vectors and blocks of rows, for each size alone."""
    for n in (*range(1, 36), 47, 48, 49, 63, 64, 65):
        check(BiasedCase(1, 2, n, 5, 4, 6, talking))
        check(BiasedCase(1, 2, 5, n, 4, 6, talking))
    for n in (*range(1, 18), 31, 32, 33, 112):
        check(BiasedCase(1, 2, 5, 6, n, 4, talking))
        check(BiasedCase(1, 2, 5, 6, 4, n, talking))


@pytest.mark.remainders
def test_every_number_of_heads(isa):
    for heads in range(1, 10):
        check(BiasedCase(1, heads, 5, 6, 4, 8, talking=True))
        check(CascadeCase(1, 4 * heads, 4, 5, 6, 3, (3,) * heads))


@pytest.mark.remainders
def test_every_window_and_key_dim(isa):
    for height, width in itertools.product((1, 2, 3, 7), (1, 2, 5, 8)):
        check(CascadeCase(1, 8, 4, 7, 8, (height, width), (3, 5)))
    for key_dim in (*range(1, 18), 31, 32):
        check(CascadeCase(1, 8, key_dim, 4, 4, None, (3, 5)))
    for value_dim in (*range(1, 18), 96, 112):
        check(CascadeCase(1, 2 * value_dim, 4, 4, 4, None, (3, 5)))


@pytest.mark.parametrize(
    "case",
    [
        BiasedCase(0, 2, 5, 6, 4, 8),
        BiasedCase(2, 0, 5, 6, 4, 8),
        BiasedCase(2, 2, 0, 6, 4, 8),
        BiasedCase(2, 2, 5, 0, 4, 8),
        BiasedCase(2, 2, 5, 6, 4, 0),
        BiasedCase(2, 2, 5, 0, 4, 8, talking=True),
        CascadeCase(0, 8, 4, 5, 6, 3, (3, 3)),
        CascadeCase(2, 8, 4, 0, 6, 3, (3, 3)),
        CascadeCase(2, 8, 4, 5, 0, 3, (3, 3)),
    ],
    ids=str,
)
def test_empty(isa, case):
    results = with_gradients(FUNCTIONS[type(case)], "cpu", case, case.inputs(), torch.float32)
    for name, result in results.items():
        assert torch.equal(result, torch.zeros_like(result)), name


@pytest.mark.parametrize("talking", [False, True], ids=["", "talking"])
def test_equal_logits_are_an_average(isa, talking):
    """Softmax of anything constant, however large, with mixing of heads that keeps it constant."""
    case = BiasedCase(2, 3, 9, 35, 8, 16, talking)
    inputs = case.inputs()
    inputs["q"].zero_()
    inputs["bias"].fill_(1e4)
    if talking:
        inputs["talking_heads"][2:] = [torch.eye(3), torch.zeros(3)]
    out = case.call(biased_attention, inputs)
    torch.testing.assert_close(out, inputs["v"].mean(dim=2, keepdim=True).expand(-1, -1, 9, -1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_logits_of_1e4(isa, layout):
    """e^1e4 is infinite in every type: only differences to the largest logit may be taken."""
    for talking in (False, True):
        case = BiasedCase(1, 2, 49, 49, 32, 32, talking, scale=2e3)
        inputs = case.inputs(torch.float16, layout)
        logits = inputs["q"].float() @ inputs["k"].float().mT * 32**-0.5
        assert logits.max() > 5e3 and logits.min() < -5e3
        results = check(case, torch.float16, layout)
        assert all(result.isfinite().all() for result in results.values())


def test_equal_logits_of_a_cascade_are_averages(isa):
    """Of a window's values, head after head: q is zero, and the bias as large as it likes."""
    case = CascadeCase(2, 12, 4, 6, 10, (3, 5), (3, 5))
    inputs = case.inputs()
    for name in ("q_dw_weights", "q_dw_biases"):
        inputs[name] = [torch.zeros_like(t) for t in inputs[name]]
    inputs["attention_bias"].fill_(1e4)
    windows = inputs["x"].double().unflatten(3, (2, 5)).unflatten(2, (2, 3))
    outs = []
    for i, group in enumerate(windows.chunk(2, dim=1)):
        feat = group if i == 0 else group + outs[-1]
        weight, bias = (inputs[name][i].double()[8:] for name in ("qkv_weights", "qkv_biases"))
        v = torch.einsum("oc,bcyixj->boyixj", weight.flatten(1), feat) + bias.reshape(-1, 1, 1, 1, 1)
        outs.append(v.mean(dim=(3, 5), keepdim=True).expand_as(v))
    expected = torch.cat(outs, dim=1).flatten(4, 5).flatten(2, 3)
    out = case.call(cascaded_group_attention, inputs)
    assert error(out, expected) <= FLOAT32_FORWARD_TOLERANCE * expected.norm()


@pytest.mark.parametrize("memory_format", FORMATS[:2])
def test_float16_logits_of_1e4_in_a_cascade(isa, memory_format):
    case = CascadeCase(1, 32, 16, 7, 7, None, (3, 5), scale=300)
    inputs = case.inputs(torch.float16, memory_format)
    wide = in_float64(inputs)
    qkv = torch.nn.functional.conv2d(wide["x"][:, :16], wide["qkv_weights"][0], wide["qkv_biases"][0])
    q, k = qkv[:, :16], qkv[:, 16:32].flatten(2)
    q = torch.nn.functional.conv2d(q, wide["q_dw_weights"][0], wide["q_dw_biases"][0], padding=1, groups=16).flatten(2)
    logits = 0.25 * q.mT @ k
    assert logits.max() > 1e4 and logits.min() < -1e4
    results = check(case, torch.float16, memory_format)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_come_out_as_in_the_reference(isa, value):
    for name in ("q", "k", "v", "bias"):
        case = BiasedCase(2, 2, 20, 35, 8, 16)
        inputs = case.inputs()
        inputs[name][..., 3, 4] = value
        with use_backend("reference"):
            expected = case.call(biased_attention, inputs)
        out = case.call(biased_attention, inputs)
        assert torch.equal(out.isnan(), expected.isnan()), name
        assert torch.equal(out.isinf(), expected.isinf()), name


def test_a_bias_of_minus_infinity_masks(isa):
    case = BiasedCase(1, 2, 9, 40, 8, 16)
    inputs = case.inputs()
    inputs["bias"][:, :, 30:] = -float("inf")
    short = {**inputs, "k": inputs["k"][:, :, :30], "v": inputs["v"][:, :, :30], "bias": inputs["bias"][:, :, :30]}
    torch.testing.assert_close(case.call(biased_attention, inputs), case.call(biased_attention, short))


@pytest.mark.parametrize("case", [BIASED[0], BIASED[1], BIASED[6], CASCADES[0], CASCADES[6]], ids=str)
def test_same_bits_every_run_and_every_thread_count(isa, case, threads):
    inputs = case.inputs()

    def everything():
        return with_gradients(FUNCTIONS[type(case)], "cpu", case, inputs, torch.float32)

    expected = everything()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        for _ in range(2):
            for name, result in everything().items():
                assert torch.equal(result, expected[name]), f"{name} with {count} threads"


@pytest.mark.parametrize("memory_format", FORMATS[:2])
def test_memory_format_is_kept(isa, memory_format):
    case = CASCADES[0]
    results = with_gradients(
        cascaded_group_attention, "cpu", case, case.inputs(memory_format=memory_format), torch.float32
    )
    expected = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    assert results["out"].is_contiguous(memory_format=expected)
    assert results["grad x"].is_contiguous(memory_format=expected)


def test_windows_are_images_of_their_own():
    """In float64, with windows that divide the image: what the kernels do by index arithmetic, by hand."""
    case = CascadeCase(2, 8, 4, 6, 8, (3, 4), (3, 5))
    inputs = in_float64(case.inputs())
    windows = inputs["x"].unflatten(2, (2, 3)).unflatten(4, (2, 4))
    whole = CascadeCase(2, 8, 4, 3, 4, None, (3, 5))
    expected = torch.empty_like(windows)
    for i, j in itertools.product(range(2), range(2)):
        expected[:, :, i, :, j] = whole.call(cascaded_group_attention, {**inputs, "x": windows[:, :, i, :, j]})
    torch.testing.assert_close(case.call(cascaded_group_attention, inputs), expected.flatten(4, 5).flatten(2, 3))
