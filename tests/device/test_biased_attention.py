"""biased_attention in Triton against float64, with and without talking heads: sizes, layouts, dtypes, extremes."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from effattn import biased_attention, use_backend
from effattn.testing import LAYOUTS, BiasedCase, allowed_error, check_softmax, error, moved, with_gradients

pytestmark = [pytest.mark.each_value, pytest.mark.usefixtures("device", "poisoned_allocations")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
talking_or_not = pytest.mark.parametrize("talking", [False, True], ids=["", "talking"])

CASES = [
    BiasedCase(1, 8, 49, 49, 32, 128),  # EfficientFormer
    BiasedCase(2, 4, 13, 49, 16, 64),  # V2's downsampling form: fewer queries than keys
    BiasedCase(3, 3, 17, 33, 5, 7, talking=True),
    BiasedCase(1, 2, 70, 100, 8, 20),
    BiasedCase(1, 3, 17, 70, 33, 20, talking=True),  # several blocks of keys
    BiasedCase(9, 1, 4, 5, 128, 8, talking=True),
    BiasedCase(1, 1, 1, 1, 1, 1),
]


def arguments(device, case, dtype=torch.float32, layout="token_major"):
    inputs = case.inputs(dtype, layout).values()
    return [moved(v, device) if isinstance(v, torch.Tensor) else [t.to(device) for t in v] for v in inputs]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.numerics
def test_against_float64(device, backend, case, layout):
    check_softmax(biased_attention, backend, case, torch.float32, layout, device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [BiasedCase(2, 4, 49, 49, 32, 64), *CASES[2:4]], ids=str)
@pytest.mark.numerics
def test_narrow_types_against_float64(device, backend, case, dtype):
    check_softmax(biased_attention, backend, case, dtype, device=device)


NARROW_CASES = [
    BiasedCase(1, 2, 33, 35, 17, 13),  # odd numbers of channels
    BiasedCase(1, 1, 20, 49, 7, 128),
    BiasedCase(1, 2, 17, 20, 5, 128, talking=True),
    BiasedCase(1, 1, 50, 150, 128, 16),  # keys, and inner sizes of the gradients, are taken in parts
    BiasedCase(1, 1, 3, 1300, 4, 8),  # more of them than are summed up in one chain
]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
@pytest.mark.numerics
def test_sizes_of_narrow_types_against_float64(device, backend, case, dtype):
    check_softmax(biased_attention, backend, case, dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.numerics
def test_layouts_of_narrow_types_against_float64(device, backend, layout, dtype):
    for case in (BiasedCase(2, 2, 24, 40, 16, 24), BiasedCase(1, 2, 9, 21, 8, 12, talking=True)):
        check_softmax(biased_attention, backend, case, dtype, layout, device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4], ids=str)
def test_views_that_are_not_aligned(device, backend, dtype, offset):
    """Tensors that begin `offset` elements behind 16 bytes, and rows that do: of the same values the same results."""
    case = BiasedCase(1, 2, 20, 35, 16, 24)
    q, k, v, bias, _ = arguments(device, case, dtype)

    def shifted(t):
        memory = t.new_empty(*t.shape[:-1], t.shape[-1] + 2 * offset)
        return memory[..., offset:-offset].copy_(t)

    results = []
    for tensors in ((q, k, v), tuple(shifted(t) for t in (q, k, v))):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = biased_attention(*leaves, bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for aligned, unaligned in zip(*results, strict=True):
        assert torch.equal(aligned, unaligned)


@pytest.mark.parametrize("heads", [1, 2, 7, 9, 17, 33])
def test_numbers_of_talking_heads(device, backend, heads):
    check_softmax(biased_attention, backend, BiasedCase(1, heads, 3, 18, 4, 8, talking=True), device=device)


@talking_or_not
def test_bias_over_more_images_than_are_added_up_at_once(device, backend, talking, monkeypatch):
    monkeypatch.setattr("effattn._triton.reduction.ROWS_ADDED_UP", 4)
    check_softmax(biased_attention, backend, BiasedCase(23, 1, 3, 4, 4, 4, talking), device=device)


@talking_or_not
def test_float16_logits_of_1e4(device, backend, talking):
    """e^1e4 is infinite in every type: only differences to the largest logit may be taken."""
    case = BiasedCase(1, 2, 49, 49, 32, 32, talking, scale=2e3)
    results = check_softmax(biased_attention, backend, case, torch.float16, device=device)
    assert all(result.isfinite().all() for result in results.values())


@talking_or_not
def test_bias_of_minus_infinity_masks(device, talking):
    """Whole blocks of keys, from the first on; and all keys of a query, of which nothing is left but NaN."""
    q, k, v, bias, mixing = arguments(device, BiasedCase(1, 2, 9, 100, 8, 16, talking))
    if talking:  # that keep heads apart: infinity times 0 is no number
        eye, zero = torch.eye(2, device=device), torch.zeros(2, device=device)
        masked = bias.clone()
        masked[:, :, :70] = -1e30
        mixing = [eye, zero, eye, zero]
    else:
        masked = bias.clone()
        masked[:, :, :70] = -torch.inf
    out = biased_attention(q, k, v, masked, talking_heads=mixing or None)
    short = biased_attention(q, k[:, :, 70:], v[:, :, 70:], bias[:, :, 70:], talking_heads=mixing or None)
    torch.testing.assert_close(out, short)
    if not talking:
        masked[1, 3] = -torch.inf
        is_nan = biased_attention(q, k, v, masked).isnan()
        assert is_nan[:, 1, 3].all() and is_nan.sum() == 16


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_weights_that_float16_does_not_hold(device, dtype):
    """Mixing makes them larger than 65504, where nothing else is: products with small values are in range."""
    case = BiasedCase(1, 2, 20, 35, 8, 16, talking=True)
    inputs = case.inputs(dtype)
    inputs["v"] *= 1e-3
    inputs["talking_heads"][2] *= 1e6
    there = {
        k: moved(v, device) if isinstance(v, torch.Tensor) else [t.to(device) for t in v] for k, v in inputs.items()
    }
    out = case.call(biased_attention, there).cpu()
    with use_backend("reference"):
        truth, plain = (
            case.call(
                biased_attention,
                {k: v.to(d) if isinstance(v, torch.Tensor) else [t.to(d) for t in v] for k, v in inputs.items()},
            )
            for d in (torch.float64, torch.float32)
        )
    assert out.isfinite().all()
    assert error(out, truth) <= allowed_error(plain.to(dtype), truth, 0.0)


@talking_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_as_the_reference_has_it(device, value, talking, dtype):
    case = BiasedCase(2, 2, 20, 35, 8, 16, talking)
    for name in ("q", "k", "v", "bias"):
        inputs = case.inputs(dtype)
        inputs[name][..., 3, 4] = value
        there = dict(zip(inputs, arguments(device, case, dtype), strict=True))
        there[name] = inputs[name].to(device)
        out = case.call(biased_attention, there).cpu()
        with use_backend("reference"):
            expected = case.call(biased_attention, inputs)
        assert torch.equal(out.isnan(), expected.isnan()), name
        assert torch.equal(out.isinf(), expected.isinf()), name


@talking_or_not
def test_same_bits_every_time(device, backend, talking):
    case = BiasedCase(2, 2, 20, 40, 16, 24, talking)
    first, *others = (
        with_gradients(biased_attention, backend, case, case.inputs(), torch.float32, device) for _ in range(3)
    )
    for results in others:
        assert all(torch.equal(a, b) for a, b in zip(results.values(), first.values(), strict=True))


@talking_or_not
@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 5, 6, 4, 8), (2, 0, 5, 6, 4, 8), (2, 2, 0, 6, 4, 8), (2, 2, 5, 0, 4, 8), (2, 2, 5, 6, 4, 0)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(device, backend, sizes, talking, dtype):
    """No batch, heads, queries, keys or values."""
    case = BiasedCase(*sizes, talking)
    for name, result in with_gradients(biased_attention, backend, case, case.inputs(dtype), dtype, device).items():
        assert torch.equal(result, torch.zeros_like(result)), name


def test_results_lie_as_the_other_backends_lay_them(device, backend):
    for layout in LAYOUTS:
        case = CASES[1]

        def strides(backend, device, layout=layout, case=case):
            q, *rest = arguments(device, case, layout=layout)
            leaf = q.detach().requires_grad_()
            with use_backend(backend):
                out = biased_attention(leaf, *rest[:3])
            return out.stride(), torch.autograd.grad(out.sum(), leaf)[0].stride()

        assert strides(backend, device) == strides("cpu", "cpu")


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        (BiasedCase(1, 1, 2, 2, 129, 2), "heads of up to 128 channels, not 129"),
        (BiasedCase(1, 2, 5, 40, 8, 140), "heads of up to 128 channels, not 140"),
        (BiasedCase(1, 65, 2, 2, 1, 1, talking=True), "up to 64 talking heads, not 65"),
    ],
    ids=["head_dim", "value_dim", "heads"],
)
def test_a_limit_is_named_or_there_is_none(device, backend, case, limit):
    if backend == "cuda":
        check_softmax(biased_attention, backend, case, device=device)
        return
    *rest, mixing = arguments(device, case)
    with pytest.raises(RuntimeError, match=f"triton: takes {limit}"):
        biased_attention(*rest, talking_heads=mixing or None)


@talking_or_not
def test_opcheck(device, ops, talking):
    for layout in LAYOUTS[:2]:
        call = arguments(device, BiasedCase(1, 2, 5, 6, 4, 8, talking), layout=layout)
        torch.library.opcheck(ops.biased_attention.default, (*call, 0.5))
        leaves = [t.detach().requires_grad_() for t in (*call[:4], *call[4])]
        torch.library.opcheck(ops.biased_attention_forward.default, (*leaves[:4], leaves[4:], 0.5))


@talking_or_not
def test_compile_without_graph_breaks(device, talking):
    """Sizes that change, in one graph; and its gradients."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(biased_attention, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for tokens in (7, 9):
        q, k, v, bias, mixing = arguments(device, BiasedCase(2, 3, tokens, tokens + 2, 4, 8, talking))
        bias.requires_grad_()
        outs = [f(q, k, v, bias, talking_heads=mixing or None) for f in (compiled, biased_attention)]
        assert torch.equal(*outs)
        first = first or counter.frame_count
        a, b = (torch.autograd.grad(out.square().sum(), bias)[0] for out in outs)
        assert torch.equal(a, b)
    assert counter.frame_count == first, "recompiled for another size"
