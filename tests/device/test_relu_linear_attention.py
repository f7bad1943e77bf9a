"""relu_linear_attention in Triton against float64: sizes, layouts, dtypes, extreme values; as an operator of torch."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from effattn import relu_linear_attention, use_backend
from effattn._triton import configs
from effattn._triton.configs import MIN_TOKENS
from effattn.testing import (
    FLOAT32_FORWARD_TOLERANCE,
    FLOAT32_GRADIENT_TOLERANCE,
    LAYOUTS,
    allowed_error,
    cancelled_gradients,
    error,
    make_tensor,
    reference_with_gradients,
)

pytestmark = [pytest.mark.each_value, pytest.mark.usefixtures("device", "poisoned_allocations")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "grad_q", "grad_k", "grad_v")


def problem(device, lead, queries, keys, head_dim, value_dim, dtype=torch.float32, layout="token_major", scale=1.0):
    sizes = ((queries, head_dim), (keys, head_dim), (keys, value_dim), (queries, value_dim))
    scales = (scale, scale, scale, 1.0)
    return [
        make_tensor(*lead, *size, layout=layout, dtype=dtype, scale=by, seed=i + 1).to(device)
        for i, (size, by) in enumerate(zip(sizes, scales, strict=True))
    ]


def fused(q, k, v, grad_out, eps=1e-15):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = relu_linear_attention(*leaves, eps=eps)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def check(q, k, v, grad_out, eps=1e-15):
    """Output and gradients with the bounds of the other backends."""
    results = fused(q, k, v, grad_out, eps)
    with torch.no_grad():
        assert torch.equal(relu_linear_attention(q, k, v, eps=eps), results[0]), "inference differs from training"
    q, k, v, grad_out, *results = (t.cpu() for t in (q, k, v, grad_out, *results))
    with use_backend("reference"):
        truth = reference_with_gradients(q, k, v, grad_out, eps, torch.float64)
        plain = reference_with_gradients(q, k, v, grad_out, eps, q.dtype)
    cancelled = dict(zip(NAMES[1:3], cancelled_gradients(q, k, v, grad_out, eps), strict=True))
    for name, result, expected, baseline in zip(NAMES, results, truth, plain, strict=True):
        assert result.dtype == q.dtype and result.shape == expected.shape
        tolerance = FLOAT32_FORWARD_TOLERANCE if name == "out" else FLOAT32_GRADIENT_TOLERANCE
        assert error(result, expected) <= allowed_error(baseline, expected, tolerance, cancelled.get(name)), name
    return results


SIZES = [  # (queries, keys, head_dim, value_dim)
    (196, 196, 16, 16),
    (49, 49, 32, 32),
    (5, 300, 7, 9),
    (300, 17, 33, 20),
    (64, 64, 128, 128),
    (1, 2, 2, 1),
    (130, 129, 8, 64),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.numerics
def test_against_float64(device, size, layout):
    check(*problem(device, (2, 3), *size, torch.float32, layout))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.numerics
def test_narrow_types_against_float64(device, dtype, size):
    check(*problem(device, (2,), *size, dtype, "channel_major"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.numerics
def test_sums_in_several_parts(device, dtype):
    """Few groups and many tokens: parts of their own, the last of them short."""
    tokens = 4 * MIN_TOKENS + 37
    check(*problem(device, (), tokens, tokens - 5, 16, 24, dtype, "channel_major"))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tokens", [4104, 4109], ids=["vectors", "elements"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_many_tokens_of_narrow_types(device, dtype, layout, tokens):
    """More than one block does at once: kernels that load vectors alone, and those that take anything."""
    channels = 16 if tokens == 4104 else 12
    check(*problem(device, (), tokens, tokens, channels, channels, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("channels", [(32, 40), (128, 72)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_wide_heads_of_narrow_types(device, dtype, layout, channels):
    tokens = 520 if channels[0] == 128 else 4104  # at most what a cluster does at once
    check(*problem(device, (), tokens, tokens, *channels, dtype, layout))


def test_a_long_sum_in_one_part(device, monkeypatch):
    """What each program does where there are more groups than a card runs at once."""
    monkeypatch.setattr(configs, "PROGRAMS", 1)
    check(*problem(device, (), 6000, 6000, 16, 16, layout="channel_major"))


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_a_sum_longer_than_a_chain(device):
    """So many tokens that a warp's sums of a narrow type leave the registers more than once."""
    tokens = 280_000
    q, k, v = (make_tensor(tokens, 4, dtype=torch.bfloat16, seed=i).to(device) for i in range(3))
    out = relu_linear_attention(q, k, v).cpu()
    with use_backend("reference"):
        plain, truth = (
            relu_linear_attention(*(t.cpu().to(dtype) for t in (q, k, v))) for dtype in (q.dtype, torch.double)
        )
    assert error(out, truth) <= allowed_error(plain, truth, 0)


def test_addresses_beyond_32_bits(device):
    """Groups that lie far apart, in memory that is reserved and mostly never touched."""
    stride = 1_500_000_000
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # which would fill all of it
    far = torch.empty(2 * stride + 20, dtype=torch.float16, device=device)
    torch.use_deterministic_algorithms(before)
    q, k, v, grad_out = problem(device, (3,), 5, 5, 4, 4, torch.float16)
    for i in range(3):
        there = far.as_strided((3, 5, 4), (stride, 4, 1)).copy_((q, k, v)[i])
        arguments = [q, k, v]
        arguments[i] = there
        for a, b in zip(fused(*arguments, grad_out), fused(q, k, v, grad_out), strict=True):
            assert torch.equal(a, b)


def test_same_bits_every_time(device):
    arguments = problem(device, (2,), 700, 900, 16, 16)
    first = fused(*arguments)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(fused(*arguments), first, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_leading_strides_that_cannot_be_merged(device, layout):
    """Permuted, expanded, and of more dimensions than kernels address."""
    q, k, v, grad_out = problem(device, (2, 1, 3), 20, 24, 13, 8, layout=layout)
    permuted = problem(device, (3, 1, 2), 20, 24, 13, 8, layout=layout)[0].transpose(0, 2)
    first, last, every = k[:1].expand_as(k), v[:, :, :1].expand_as(v), q[:1, :, :1].expand_as(q)
    for arguments in ((permuted, k, v), (q, first, v), (q, k, last), (every, first, last)):
        check(*arguments, grad_out)
    many = problem(device, (2, 3, 2, 2, 2), 5, 6, 4, 3, layout=layout)
    many[0] = many[0].transpose(0, 2).contiguous().transpose(0, 2)
    many[1] = many[1].transpose(1, 3).contiguous().transpose(1, 3)
    many[2] = many[2].transpose(2, 4).contiguous().transpose(2, 4)
    check(*many)


def test_results_lie_as_the_other_backends_lay_them(device):
    for layout in LAYOUTS:
        q, k, v, grad_out = problem(device, (2, 3), 20, 24, 13, 8, layout=layout)
        got = fused(q, k, v, grad_out)
        with use_backend("cpu"):
            expected = fused(*(t.cpu() for t in (q, k, v, grad_out)))
        assert [t.stride() for t in got] == [t.stride() for t in expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_values(device, dtype):
    """Activations of 1e4, whose sums no narrow type holds."""
    for result in check(*problem(device, (2,), 600, 600, 16, 16, dtype, "channel_major", scale=1e4)):
        assert result.isfinite().all()


@pytest.mark.parametrize("eps", [1e-15, 1e-40], ids=["1e-15", "subnormal"])
def test_queries_whose_relu_is_zero(device, eps):
    """0 / (0 + eps) is 0, and so are its gradients; not NaN, even if 1 / eps is beyond float32."""
    q, k, v, grad_out = problem(device, (2,), 70, 70, 16, 16)
    for name, result in zip(NAMES, fused(-q.abs(), k, v, grad_out, eps), strict=True):
        assert torch.equal(result, torch.zeros_like(result)), name


def test_eps_zero_is_the_plain_quotient(device):
    q, k, v, grad_out = problem(device, (2,), 45, 45, 16, 16)
    check(q.abs() + 0.1, k.abs() + 0.1, v, grad_out, eps=0.0)
    assert relu_linear_attention(-q.abs(), k, v, eps=0.0).isnan().all(), "0 / 0, as in the reference"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_as_the_reference_has_it(device, value):
    for of in range(3):
        arguments = problem(device, (2,), 37, 41, 8, 8)
        arguments[of][0, 3, 2] = value
        got = fused(*arguments)
        with use_backend("reference"):
            expected = fused(*arguments)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize(
    "sizes", [(0, 5, 6, 4, 3), (2, 0, 6, 4, 3), (2, 5, 0, 4, 3), (2, 5, 6, 0, 3), (2, 5, 6, 4, 0)], ids=str
)
def test_nothing(device, sizes):
    """No batch, queries, keys, head_dim or value_dim."""
    batch, *sizes = sizes
    arguments = problem(device, (batch,), *sizes)
    got = fused(*arguments, eps=1.0)
    with use_backend("reference"):
        expected = fused(*arguments, eps=1.0)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_sizes_out_of_range_are_named(device, backend):
    with pytest.raises(RuntimeError, match=rf"{backend}: takes heads of up to 128 channels, not 129"):
        relu_linear_attention(*problem(device, (2,), 5, 5, 129, 3)[:3])


def test_opcheck(device, ops):
    q, k, v, _ = problem(device, (2, 3), 20, 24, 13, 8, layout="channel_major")
    for name in ("relu_linear_attention", "relu_linear_attention_forward"):
        torch.library.opcheck(getattr(ops, name).default, (q, k, v, 1e-6))
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(ops.relu_linear_attention_forward.default, (*leaves, 1e-6))


def test_double_backward(device):
    leaves = [t.detach().requires_grad_() for t in problem(device, (2,), 9, 7, 4, 4)[:3]]
    out = relu_linear_attention(*leaves, eps=1e-3)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    second = torch.autograd.grad(grad.square().sum(), leaves)
    with use_backend("reference"):
        out = relu_linear_attention(*leaves, eps=1e-3)
        (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
        expected = torch.autograd.grad(grad.square().sum(), leaves)
    for a, b in zip(second, expected, strict=True):
        assert error(a, b.double()) <= FLOAT32_GRADIENT_TOLERANCE * b.norm()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_compile_without_graph_breaks(device, grad):
    """Sizes that change, in one graph; and its gradients."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(relu_linear_attention, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for tokens in (20, 33):
        *arguments, grad_out = problem(device, (2, 3), tokens, tokens + 4, 13, 8)
        leaves = [t.requires_grad_(grad) for t in arguments]
        outs = compiled(*leaves), relu_linear_attention(*leaves)
        assert torch.equal(*outs)
        first = first or counter.frame_count
        if grad:
            for a, b in zip(*(torch.autograd.grad(out, leaves, grad_out) for out in outs), strict=True):
                assert torch.equal(a, b)
    assert counter.frame_count == first, "recompiled for another size"


def test_autocast_keeps_what_comes(device):
    """The sums are float32 anyway; arguments that autocast made of two types are promoted."""
    q, k, v, _ = problem(device, (2,), 20, 24, 8, 8)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert relu_linear_attention(q, k, v).dtype == torch.float32
        mixed = relu_linear_attention(q.bfloat16(), k, v)
    assert torch.equal(mixed, relu_linear_attention(q.bfloat16().float(), k, v))


def test_direct_calls_with_too_many_channels_are_refused(device, ops):
    wide = torch.ones(2, 3, 129, device=device)
    for arguments in ((wide, wide, wide[..., :4]), (wide[..., :4], wide[..., :4], wide)):
        with pytest.raises(RuntimeError, match="the kernels take heads of up to 128 channels, not 129"):
            ops.relu_linear_attention(*arguments, 1e-15)
