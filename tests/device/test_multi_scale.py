"""The multi-scale operators in Triton against float64: sizes, layouts, dtypes, extremes; as operators of torch."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from effattn import multi_scale_aggregation, multi_scale_linear_attention, use_backend
from effattn._triton import configs
from effattn.testing import MultiScaleCase, check_multi_scale, moved, with_gradients

pytestmark = [pytest.mark.each_value, pytest.mark.usefixtures("device", "poisoned_allocations")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("nchw", "channels_last", "channel slice", "crop", "transposed")
FUNCTIONS = (multi_scale_aggregation, multi_scale_linear_attention)

both = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__.removeprefix("multi_scale_"))

CASES = [
    MultiScaleCase(2, 2, 16, 5, 6),
    MultiScaleCase(1, 1, 8, 8, 9, kernels=(3, 7), biases=True),
    MultiScaleCase(1, 1, 13, 6, 5, kernels=(9, 1), biases=True),
    MultiScaleCase(1, 1, 33, 5, 6, kernels=(3,), biases=True),  # heads in several chunks
    MultiScaleCase(2, 3, 4, 1, 1, kernels=()),
    MultiScaleCase(1, 1, 3, 2, 70, kernels=(3,)),  # several tiles
    MultiScaleCase(2, 1, 8, 9, 24, kernels=(5,), biases=True),  # rows of whole vectors
    MultiScaleCase(1, 1, 64, 3, 20, kernels=(3, 1)),
    MultiScaleCase(1, 1, 128, 3, 20, kernels=(3, 1)),
]


def arguments(device, case, dtype=torch.float32, memory_format="nchw"):
    inputs = case.inputs(dtype, memory_format).values()
    return [moved(v, device) if isinstance(v, torch.Tensor) else [t.to(device) for t in v] for v in inputs]


@both
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.numerics
def test_against_float64(device, backend, function, case):
    check_multi_scale(function, backend, case, device=device)


@both
@pytest.mark.parametrize("memory_format", FORMATS[1:])
@pytest.mark.numerics
def test_memory_formats_against_float64(device, backend, function, memory_format):
    case = MultiScaleCase(2, 1, 8, 5, 6, kernels=(3,), biases=True)
    check_multi_scale(function, backend, case, torch.float32, memory_format, device=device)


NARROW_CASES = [
    (MultiScaleCase(1, 1, 32, 9, 20, kernels=(5,), biases=True), FORMATS),
    (MultiScaleCase(1, 1, 13, 10, 18, kernels=(3, 5)), FORMATS[:2]),
    (MultiScaleCase(1, 2, 3, 5, 21, kernels=(5,)), FORMATS[:2]),
    (MultiScaleCase(2, 1, 24, 8, 16, kernels=(3,)), FORMATS[:2]),
    (MultiScaleCase(1, 1, 8, 25, 40, kernels=(5,), biases=True), FORMATS[:2]),  # several tiles and parts
]


@pytest.mark.parametrize(
    "backend", ["cuda"], indirect=True
)  # which has kernels for them; interpreted, they take minutes
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("case", "memory_formats"), NARROW_CASES, ids=str)
@pytest.mark.numerics
def test_narrow_attention_against_float64(device, backend, case, memory_formats, dtype):
    """Heads that fill what is padded and heads that do not, in every place that memory can have them."""
    for memory_format in memory_formats:
        check_multi_scale(multi_scale_linear_attention, backend, case, dtype, memory_format, device=device)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_blocks_that_take_several_tiles_of_queries(device, backend, dtype, monkeypatch):
    monkeypatch.setenv("EFFATTN_EMULATED_MULTIPROCESSORS", "4")
    batch = 1 if device.type == "cpu" else 64  # of a card's multiprocessors more are wanted
    for head_dim, kernels in ((13, (3, 5)), (32, (5,))):
        case = MultiScaleCase(batch, 1, head_dim, 26, 40, kernels=kernels, biases=True)
        for memory_format in FORMATS[:2]:
            check_multi_scale(multi_scale_linear_attention, backend, case, dtype, memory_format, device=device)


@both
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.numerics
def test_narrow_types_against_float64(device, backend, function, dtype):
    for memory_format in FORMATS[:2]:
        for height, width in ((6, 7), (3, 24)):
            case = MultiScaleCase(1, 1, 16, height, width, kernels=(3,), biases=True)
            check_multi_scale(function, backend, case, dtype, memory_format, device=device)


@both
@pytest.mark.numerics
def test_sums_in_several_parts(device, backend, function):
    """Few heads and many tokens; the last part is short."""
    case = MultiScaleCase(1, 1, 4, 23, 25, kernels=(3,))
    assert configs.split(2, 23 * 25, 64)[1] > 1
    check_multi_scale(function, backend, case, device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_values(device, backend, dtype):
    """Activations of 1e4, whose sums no narrow type holds."""
    case = MultiScaleCase(1, 1, 16, 9, 10, kernels=(3,), scale=1e4)
    results = check_multi_scale(multi_scale_linear_attention, backend, case, dtype, device=device)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@both
def test_not_a_number_as_the_reference_has_it(device, backend, function, value, dtype):
    case = MultiScaleCase(1, 2, 4, 6, 7, kernels=(3,))
    inputs = case.inputs(dtype)
    inputs["qkv"][0, 5, 3, 2] = value
    got = with_gradients(function, backend, case, inputs, dtype, device)["out"]
    expected = with_gradients(function, "reference", case, inputs, dtype)["out"]
    assert torch.equal(got.isnan(), expected.isnan())


@both
def test_same_bits_every_time(device, backend, function):
    case = MultiScaleCase(2, 1, 8, 6, 7, kernels=(3, 1), biases=True)
    first, *others = (with_gradients(function, backend, case, case.inputs(), torch.float32, device) for _ in range(2))
    for results in others:
        assert all(torch.equal(a, b) for a, b in zip(results.values(), first.values(), strict=True))


@both
@pytest.mark.parametrize("case", [MultiScaleCase(0, 1, 8, 5, 6), MultiScaleCase(2, 1, 8, 0, 6)], ids=str)
def test_empty(device, backend, function, case):
    for name, result in with_gradients(function, backend, case, case.inputs(), torch.float32, device).items():
        assert torch.equal(result, torch.zeros_like(result)), name


@both
@pytest.mark.parametrize("memory_format", FORMATS)
def test_results_lie_as_the_other_backends_lay_them(device, backend, function, memory_format):
    case = MultiScaleCase(2, 1, 4, 3, 4, kernels=(3,))
    options = {"eps": 1e-15} if function is multi_scale_linear_attention else {}

    def strides(backend, device):
        qkv, *weights = arguments(device, case, memory_format=memory_format)
        leaf = qkv.detach().requires_grad_()
        with use_backend(backend):
            out = function(leaf, *weights, head_dim=case.head_dim, **options)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        return out.stride(), grad.stride()

    assert strides(backend, device) == strides("cpu", "cpu")


def test_heads_out_of_range_are_named(device, backend):
    case = MultiScaleCase(1, 1, 129, 2, 2)
    with pytest.raises(RuntimeError, match=rf"{backend}: takes heads of up to 128 channels, not 129"):
        case.call(multi_scale_aggregation, dict(zip(case.inputs(), arguments(device, case), strict=True)))


def test_opcheck(device, ops):
    case = MultiScaleCase(1, 1, 4, 5, 6, kernels=(3,), biases=True)
    for memory_format in FORMATS[:2]:
        qkv, *weights = arguments(device, case, memory_format=memory_format)
        for name, options in (("multi_scale_aggregation", (4,)), ("multi_scale_linear_attention", (4, 1e-6))):
            torch.library.opcheck(getattr(ops, name).default, (qkv, *weights, *options))
            leaves = [t.detach().requires_grad_() for t in (qkv, *(w[0] for w in weights))]
            call = (leaves[0], *([t] for t in leaves[1:]), *options)
            torch.library.opcheck(getattr(ops, f"{name}_forward").default, call)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_compile_without_graph_breaks(device, grad):
    """Sizes that change, in one graph; and its gradients."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(multi_scale_linear_attention, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for height in (5, 7):  # sizes of nothing else, or torch takes them for the same
        case = MultiScaleCase(2, 1, 4, height, 6, kernels=(3,))
        qkv, *weights = arguments(device, case)
        qkv.requires_grad_(grad)
        outs = [f(qkv, *weights[:2], head_dim=4) for f in (compiled, multi_scale_linear_attention)]
        assert torch.equal(*outs)
        first = first or counter.frame_count
        if grad:
            a, b = (torch.autograd.grad(out.square().sum(), qkv)[0] for out in outs)
            assert torch.equal(a, b)
    assert counter.frame_count == first, "recompiled for another size"
