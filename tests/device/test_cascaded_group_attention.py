"""cascaded_group_attention in Triton against float64: windows, sizes, layouts, dtypes, extremes; as an operator."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from effattn import cascaded_group_attention, use_backend
from effattn.testing import CascadeCase, check_softmax, moved, with_gradients

pytestmark = [pytest.mark.each_value, pytest.mark.usefixtures("device", "poisoned_allocations")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("nchw", "channels_last", "channel slice", "crop", "transposed")

CASES = [
    CascadeCase(1, 64, 16, 7, 14, 7, (7, 5, 3, 3)),  # m0 stage 1, half an image
    CascadeCase(2, 48, 16, 4, 4, None, (7, 5, 3)),  # kernels larger than the window
    CascadeCase(1, 12, 5, 5, 5, (4, 3), (3, 9), biases=False),  # windows that do not divide the image
    CascadeCase(3, 8, 4, 2, 2, 1, (3, 3)),  # windows of one token
    CascadeCase(2, 7, 3, 5, 4, 7, (5,)),  # one head; a window larger than the image
]


def arguments(device, case, dtype=torch.float32, memory_format="nchw"):
    inputs = case.inputs(dtype, memory_format).values()
    return [moved(v, device) if isinstance(v, torch.Tensor) else [t.to(device) for t in v] for v in inputs]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.numerics
def test_against_float64(device, backend, case):
    check_softmax(cascaded_group_attention, backend, case, device=device)


@pytest.mark.parametrize("memory_format", FORMATS[1:])
@pytest.mark.numerics
def test_memory_formats_against_float64(device, backend, memory_format):
    check_softmax(cascaded_group_attention, backend, CASES[2], torch.float32, memory_format, device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES[1:3], ids=str)
@pytest.mark.numerics
def test_narrow_types_against_float64(device, backend, case, dtype):
    check_softmax(cascaded_group_attention, backend, case, dtype, device=device)


@pytest.mark.parametrize(
    "case",
    [
        CascadeCase(1, 16, 33, 3, 3, None, (3, 1)),  # keys in several chunks
        CascadeCase(1, 140, 4, 2, 3, None, (3, 3)),  # values in several chunks
        CascadeCase(1, 8, 4, 9, 10, None, (3, 3)),  # queries in several tiles
        CascadeCase(1, 27, 4, 3, 3, None, (3,) * 9),
    ],
    ids=str,
)
def test_sizes_beyond_a_tile(device, backend, case):
    check_softmax(cascaded_group_attention, backend, case, device=device)


def test_programs_that_take_several_windows(device, backend, monkeypatch):
    """And sums over more windows than are added up at once."""
    monkeypatch.setattr("effattn._triton.cascaded_group_attention.CASCADE_PROGRAMS", 3)
    monkeypatch.setattr("effattn._triton.reduction.ROWS_ADDED_UP", 4)
    monkeypatch.setenv("EFFATTN_EMULATED_MULTIPROCESSORS", "3")
    check_softmax(cascaded_group_attention, backend, CascadeCase(2, 8, 4, 4, 6, 2, (3, 3)), device=device)


def test_float16_logits_of_1e4(device, backend):
    case = CascadeCase(1, 32, 16, 7, 7, None, (3, 5), scale=300)
    results = check_softmax(cascaded_group_attention, backend, case, torch.float16, device=device)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_as_the_reference_has_it(device, backend, value, dtype):
    """It spreads from its head to the heads behind it, and not to another window."""
    case = CascadeCase(1, 12, 4, 4, 6, 3, (3, 3, 3))
    inputs = case.inputs(dtype)
    inputs["x"][0, 5, 1, 2] = value
    got = with_gradients(cascaded_group_attention, backend, case, inputs, dtype, device)["out"]
    expected = with_gradients(cascaded_group_attention, "reference", case, inputs, dtype)["out"]
    assert torch.equal(got.isnan(), expected.isnan())


def test_same_bits_every_time(device, backend):
    first, *others = (
        with_gradients(cascaded_group_attention, backend, CASES[1], CASES[1].inputs(), torch.float32, device)
        for _ in range(2)
    )
    for results in others:
        assert all(torch.equal(a, b) for a, b in zip(results.values(), first.values(), strict=True))


@pytest.mark.parametrize("sizes", [(0, 5, 6), (2, 0, 6), (2, 5, 0)], ids=str)
def test_empty(device, backend, sizes):
    batch, height, width = sizes
    case = CascadeCase(batch, 8, 4, height, width, 3, (3, 3))
    results = with_gradients(cascaded_group_attention, backend, case, case.inputs(), torch.float32, device)
    for name, result in results.items():
        assert torch.equal(result, torch.zeros_like(result)), name


@pytest.mark.parametrize("memory_format", FORMATS)
def test_results_lie_as_the_other_backends_lay_them(device, backend, memory_format):
    case = CascadeCase(2, 8, 4, 4, 5, 3, (3, 3))

    def strides(backend, device):
        x, *weights = arguments(device, case, memory_format=memory_format)
        leaf = x.detach().requires_grad_()
        with use_backend(backend):
            out = cascaded_group_attention(leaf, *weights, window_size=3)
        return out.stride(), torch.autograd.grad(out.sum(), leaf)[0].stride()

    assert strides(backend, device) == strides("cpu", "cpu")


@pytest.mark.parametrize("case", [CascadeCase(1, 129, 2, 2, 2, None, (3,)), CascadeCase(1, 2, 129, 2, 2, None, (3,))])
def test_a_limit_is_named_or_there_is_none(device, backend, case):
    if backend == "cuda":
        check_softmax(cascaded_group_attention, backend, case, device=device)
        return
    x, *weights = arguments(device, case)
    with pytest.raises(RuntimeError, match=r"triton: takes heads of up to 128 channels, not 129"):
        cascaded_group_attention(x, *weights)


def test_opcheck(device, ops):
    for memory_format in FORMATS[:2]:
        call = arguments(device, CascadeCase(1, 4, 2, 2, 3, 2, (3,)), memory_format=memory_format)
        torch.library.opcheck(ops.cascaded_group_attention.default, (*call, 0.5, 2, 2))
        leaves = [
            t.detach().requires_grad_() if isinstance(t, torch.Tensor) else [w.detach().requires_grad_() for w in t]
            for t in call
        ]
        torch.library.opcheck(ops.cascaded_group_attention_forward.default, (*leaves, 0.5, 2, 2))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_compile_without_graph_breaks(device, grad):
    """Sizes that change, in one graph; and its gradients."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cascaded_group_attention, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for height in (5, 7):  # sizes of nothing else, or torch takes them for the same
        x, *weights = arguments(device, CascadeCase(2, 8, 4, height, 2, 2, (3, 3)))
        x.requires_grad_(grad)
        outs = [f(x, *weights, window_size=2) for f in (compiled, cascaded_group_attention)]
        assert torch.equal(*outs)
        first = first or counter.frame_count
        if grad:
            a, b = (torch.autograd.grad(out.square().sum(), x)[0] for out in outs)
            assert torch.equal(a, b)
    assert counter.frame_count == first, "recompiled for another size"
