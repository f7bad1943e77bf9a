"""relu_linear_attention against float64: sizes, layouts, dtypes, instruction sets, extreme values.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import itertools
import os
import threading

import psutil
import pytest
import torch

from effattn import _library, relu_linear_attention
from effattn.ops import OPERATORS
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

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise, pytest.mark.usefixtures("poisoned_allocations")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-15
NAMES = ("out", "grad_q", "grad_k", "grad_v")


def fused(q, k, v, grad_out, eps=EPS):
    """(out, grad_q, grad_k, grad_v) of the operator under test."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = relu_linear_attention(*leaves, eps=eps)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def check(q, k, v, grad_out, eps=EPS):
    """Compares output and gradients with float64, allowing what the plain formulation needs itself."""
    truth = reference_with_gradients(q, k, v, grad_out, eps, torch.float64)
    plain = reference_with_gradients(q, k, v, grad_out, eps, q.dtype)
    cancelled = dict(zip(NAMES[1:3], cancelled_gradients(q, k, v, grad_out, eps), strict=True))
    results = fused(q, k, v, grad_out, eps)
    with torch.no_grad():
        assert torch.equal(relu_linear_attention(q, k, v, eps=eps), results[0]), "inference differs from training"
    for name, result, expected, baseline in zip(NAMES, results, truth, plain, strict=True):
        assert result.dtype == q.dtype
        assert result.shape == expected.shape
        tolerance = FLOAT32_FORWARD_TOLERANCE if name == "out" else FLOAT32_GRADIENT_TOLERANCE
        allowed = allowed_error(baseline, expected, tolerance, cancelled.get(name))
        assert error(result, expected) <= allowed, name
    return results


def problem(lead, queries, keys, head_dim, value_dim, dtype, layouts, scale=1.0):
    q_layout, k_layout, v_layout, grad_layout = layouts
    return (
        make_tensor(*lead, queries, head_dim, layout=q_layout, dtype=dtype, scale=scale, seed=1),
        make_tensor(*lead, keys, head_dim, layout=k_layout, dtype=dtype, scale=scale, seed=2),
        make_tensor(*lead, keys, value_dim, layout=v_layout, dtype=dtype, scale=scale, seed=3),
        make_tensor(*lead, queries, value_dim, layout=grad_layout, dtype=dtype, seed=4),
    )


SIZES = [  # (queries, keys, head_dim, value_dim)
    (196, 196, 16, 16),
    (49, 49, 32, 32),
    (5, 300, 7, 9),
    (300, 17, 33, 20),
    (64, 64, 128, 128),
    (2, 2, 130, 3),
    (2100, 2100, 8, 8),  # two chunks
    (2050, 2050, 8, 8),  # the second shorter than a vector
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(isa, dtype, size, layout):
    check(*problem((2, 3), *size, dtype, (layout,) * 4))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"), [(torch.float32, 16, 24), (torch.float32, 13, 17), (torch.bfloat16, 33, 7)]
)
@pytest.mark.parametrize("tokens", [(37, 41), (600, 530)], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS[:2], repeat=4)), ids="-".join)
def test_every_mix_of_layouts(isa, layouts, tokens, dtype, head_dim, value_dim):
    check(*problem((2,), *tokens, head_dim, value_dim, dtype, layouts))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # the narrow types differ in single elements only
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.remainders
def test_every_remainder_of_tokens(isa, layout, dtype):
    """Each number of tokens around a vector, a register block and a tile; of keys another than of queries."""
    tile = _library._C.relu_linear_attention_plan(
        groups=1, queries=4096, keys=4096, head_dim=16, value_dim=16, dtype="float32"
    )["tile"]
    swept = [*range(1, 50), *range(tile - 2, tile + 18)]
    for queries, keys in zip(swept, reversed(swept), strict=True):
        check(*problem((), queries, keys, 16, 16, dtype, (layout,) * 4))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.remainders
def test_every_remainder_of_channels(isa, layout, dtype):
    for channels in range(1, 50):
        check(*problem((), 20, 23, channels, 50 - channels, dtype, (layout,) * 4))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_leading_strides_that_cannot_be_merged(isa, layout):
    """Permuted, with a dimension of one inside, and expanded over the first, the last or all of them."""
    q, k, v, grad_out = problem((2, 1, 3), 20, 24, 13, 8, torch.float32, (layout,) * 4)
    permuted = problem((3, 1, 2), 20, 24, 13, 8, torch.float32, (layout,) * 4)[0].transpose(0, 2)
    first, last, every = k[:1].expand_as(k), v[:, :, :1].expand_as(v), q[:1, :, :1].expand_as(q)
    for arguments in ((permuted, k, v), (q, first, v), (q, k, last), (every, k, v), (every, first, last)):
        check(*arguments, grad_out)


def test_expanded_gradients_and_tokens(isa):
    """What sum().backward() passes back, and one token or one channel for all."""
    for tokens in (37, 2100):
        q, k, v, grad_out = problem((2,), tokens, tokens, 13, 16, torch.float32, ("channel_major",) * 4)
        check(q, k, v, torch.ones(()).expand_as(grad_out))
        check(q, k, v[:, :1].expand_as(v), grad_out)
        check(q, k, v[..., :1].expand_as(v), grad_out)


def test_groups_split_over_threads(isa):
    """Fewer groups than threads can share evenly, and several chunks: partial sums are added up across threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for head_dim in (16, 13):
            check(*problem((3,), 4200, 4200, head_dim, 16, torch.float32, ("channel_major",) * 4))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 1, 3)], ids=str)
def test_leading_dimensions(isa, lead):
    check(*problem(lead, 20, 24, 16, 8, torch.float32, ("channel_major",) * 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (0, 4, 3, 3),
        (4, 0, 3, 3),
        (4, 4, 0, 3),
        (4, 4, 3, 0),
        (0, 0, 0, 0),
        (1, 1, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("lead", [(), (2,), (0,), (3, 0)], ids=str)
def test_empty_and_single(isa, dtype, size, lead):
    check(*problem(lead, *size, dtype, ("token_major",) * 4))


def test_strides_of_real_callers(isa):
    """Slices of a fused qkv tensor, heads inside of tokens, and expanded heads: nothing is copied."""
    qkv = make_tensor(2, 50, 3 * 4 * 16)
    heads_inside = qkv.unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, D)
    q, k, v = heads_inside.unbind(0)
    out, grad_q, _, _ = check(q, k, v, torch.ones_like(q))
    assert out.transpose(1, 2).is_contiguous(), "the reshape to (B, N, C) must be free"
    assert grad_q.transpose(1, 2).is_contiguous()
    channel_major = make_tensor(2, 4, 48, 50).transpose(-1, -2).chunk(3, dim=-1)
    out, *_ = check(*channel_major, torch.ones(2, 4, 50, 16))
    assert out.transpose(-1, -2).is_contiguous(), "the reshape to (B, C, H, W) must be free"
    shared = make_tensor(1, 30, 16).expand(4, 30, 16)
    check(make_tensor(4, 20, 16), shared, shared, torch.ones(4, 20, 16))


FLOAT16_TOKENS = pytest.mark.parametrize("tokens", [pytest.param(16384, marks=pytest.mark.slow), 2100])


@FLOAT16_TOKENS
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_float16_in_its_whole_range(isa, layout, tokens):
    """Sums reach 1e14 with the most tokens; the official formulation overflows in float16."""
    dim = 16
    q, k, v, grad_out = problem((1,), tokens, tokens, dim, dim, torch.float32, (layout,) * 4, scale=3e4)
    limit = torch.finfo(torch.float16).max
    q, k, v = (t.clamp(-limit, limit).to(torch.float16) for t in (q, k, v))
    assert q.abs().max() == limit
    results = check(q, k, v, grad_out.to(torch.float16))
    assert all(result.isfinite().all() for result in results)
    assert results[0].abs().max() > 0


@FLOAT16_TOKENS
def test_float16_activations_of_1e4(isa, tokens):
    q, k, v, grad_out = problem((2,), tokens, tokens, 32, 32, torch.float32, ("channel_major",) * 4, scale=1e4)
    half = [t.to(torch.float16) for t in (q, k, v, grad_out)]
    results = check(*half)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("eps", [EPS, 1e-40], ids=["1e-15", "subnormal"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_queries_whose_relu_is_zero(isa, layout, eps):
    """0 / (0 + eps) is 0, and so are its gradients; not NaN, even if 1 / eps is beyond float32."""
    q, k, v, grad_out = problem((2,), 70, 70, 16, 16, torch.float32, (layout,) * 4)
    results = fused(-q.abs(), k, v, grad_out, eps)
    for name, result in zip(NAMES, results, strict=True):
        assert torch.equal(result, torch.zeros_like(result)), name


def test_eps_zero_is_the_plain_quotient(isa):
    q, k, v, grad_out = problem((2,), 45, 45, 16, 16, torch.float32, ("channel_major",) * 4)
    check(q.abs() + 0.1, k.abs() + 0.1, v, grad_out, eps=0.0)
    out = relu_linear_attention(-q.abs(), k, v, eps=0.0)
    assert out.isnan().all(), "0 / 0, as in the reference"


def test_eps_matters(isa):
    q, k, v, grad_out = problem((2,), 45, 45, 16, 16, torch.float32, ("token_major",) * 4, scale=0.1)
    check(q, k, v, grad_out, eps=1.0)
    assert not torch.allclose(relu_linear_attention(q, k, v, eps=1.0), relu_linear_attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("argument", range(4), ids=["q", "k", "v", "grad_out"].__getitem__)
@pytest.mark.parametrize("dim", [16, 13])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_nan_and_inf_come_out_as_in_the_reference(isa, dtype, value, argument, dim, layout):
    tensors = [t.clone() for t in problem((2,), 40, 40, dim, dim, dtype, (layout,) * 4)]
    tensors[argument][0, 7, 5] = value
    q, k, v, grad_out = tensors
    expected = reference_with_gradients(q, k, v, grad_out, EPS, dtype)
    results = fused(q, k, v, grad_out)
    assert torch.equal(results[0].isnan(), expected[0].isnan())
    assert torch.equal(results[0].isinf(), expected[0].isinf())
    # Whether a gradient is NaN or infinite depends on the order of the operations; that it is neither does not.
    for name, result, reference_result in zip(NAMES, results, expected, strict=True):
        assert torch.equal(result.isfinite(), reference_result.isfinite()), name
        assert result[1].isfinite().all(), f"{name} of the other group"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.remainders
def test_storage_conversions_are_exact(isa, dtype, layout):
    """With one key of 1, the output is v rounded once: every bit pattern must survive the way through."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype) if dtype != torch.float32 else bits.to(torch.int32).bitwise_left_shift(16).view(dtype)
    v = values[values.isfinite()].reshape(1, 1, -1)
    one = torch.ones(1, 1, 1, dtype=dtype)
    if layout == "channel_major":
        v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    out = relu_linear_attention(one, one, v, eps=0.0)
    assert torch.equal(out.float(), v.float())


def bits(tensors):
    return [t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim", "layout"), [(16, 16, "channel_major"), (35, 20, "token_major")])
def test_same_bits_with_every_instruction_set(isa, dtype, head_dim, value_dim, layout, threads):
    check_same_bits(2, (((3,), 2050), ((9,), 30)), dtype, head_dim, value_dim, layout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim", "layout"), [(16, 16, "channel_major"), (35, 20, "token_major")])
def test_same_bits_every_run_and_every_thread_count(dtype, head_dim, value_dim, layout, threads):
    """With the instruction set that users get: which thread does what is the same for all."""
    check_same_bits(20, (((3,), 9000), ((3,), 2050), ((40,), 300)), dtype, head_dim, value_dim, layout)


def check_same_bits(runs, sizes, dtype, head_dim, value_dim, layout):
    """Many chunks of few groups, so that groups are split over threads; and many groups."""
    for lead, tokens in sizes:
        arguments = problem(lead, tokens, tokens, head_dim, value_dim, dtype, (layout,) * 4)

        def everything(arguments=arguments):
            sums = torch.ops.effattn.relu_linear_attention_forward(*arguments[:3], EPS)[1]
            return bits([*fused(*arguments), sums])

        expected = everything()
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for _ in range(runs if count == 2 else 2):
                for name, result, first in zip((*NAMES, "sums"), everything(), expected, strict=True):
                    assert torch.equal(result, first), f"{name} with {count} threads"


@pytest.mark.schedule
def test_four_python_threads_at_once(isa):
    arguments = [problem((8,), 700 + i, 700, 16, 16, torch.float32, ("channel_major",) * 4) for i in range(4)]
    expected = [fused(*each) for each in arguments]
    failures = []

    def work(i):
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(fused(*arguments[i]), expected[i], strict=True)):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_float64_runs_through_the_reference():
    q, k, v, grad_out = (t.double() for t in problem((2,), 20, 20, 8, 8, torch.float32, ("token_major",) * 4))
    expected = reference_with_gradients(q, k, v, grad_out, EPS, torch.float64)
    for result, truth in zip(fused(q, k, v, grad_out), expected, strict=True):
        assert torch.equal(result, truth)


def test_reference_is_the_equation():
    """The reference itself, against the quadratic form written out."""
    q, k, v, _ = (t.double() for t in problem((2,), 9, 11, 4, 5, torch.float32, ("token_major",) * 4))
    weights = torch.einsum("bnd,bmd->bnm", q.clamp_min(0), k.clamp_min(0))
    truth = torch.einsum("bnm,bme->bne", weights, v) / (weights.sum(-1, keepdim=True) + EPS)
    assert torch.allclose(OPERATORS["relu_linear_attention"].plain(q, k, v, EPS), truth, rtol=1e-12, atol=0)


LARGE = 2**27 + 3  # tokens of 16 channels: offsets pass 2^31


def needs_memory(gigabytes):
    if os.environ.get("EFFATTN_TEST_LARGE") != "1":
        pytest.skip(f"takes half a minute and {gigabytes} GiB: set EFFATTN_TEST_LARGE=1 to run it")
    available = psutil.virtual_memory().available / 2**30
    if available < gigabytes + 2:
        pytest.skip(f"needs {gigabytes} GiB and 2 to spare; {available:.0f} are available")


def large(layout, value):
    sizes = (LARGE, 16) if layout == "token_major" else (16, LARGE)
    t = torch.full((1, *sizes), value, dtype=torch.bfloat16)
    return t if layout == "token_major" else t.mT


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_more_than_2_to_the_31_elements_of_queries(layout):
    """q, the output and both their gradients; the last token differs, and is where an overflow would show."""
    needs_memory(12)
    q = large(layout, 0.5)
    q[:, -1] = 0
    k = torch.ones(1, 2, 16, dtype=torch.bfloat16)
    v = torch.tensor([1.0, 3.0], dtype=torch.bfloat16).reshape(1, 2, 1).expand(1, 2, 16)
    grad_out = torch.ones((), dtype=torch.bfloat16).expand(q.shape)
    with torch.no_grad():
        out, sums = torch.ops.effattn.relu_linear_attention_forward(q, k, v, EPS)
    assert out.numel() > 2**31
    assert (out[:, :-1] == 2).all()
    assert (out[:, -1] == 0).all()
    del out
    grad_q, grad_k, grad_v = torch.ops.effattn.relu_linear_attention_backward(grad_out, q, k, v, sums, EPS)
    # Every query weighs both keys alike: nothing moves q, a key gains by the difference of v to the mean.
    assert (grad_q == 0).all()
    scale = 0.5 * 16 * (LARGE - 1) / (0.5 * 16 * 2)
    assert torch.allclose(grad_k[0].float(), torch.tensor([[-scale], [scale]]).expand(2, 16), rtol=1e-2)
    assert torch.allclose(grad_v.float(), torch.full((1, 2, 16), (LARGE - 1) / 2), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_more_than_2_to_the_31_elements_of_keys(layout):
    """k and v and their gradients; only the last key has a weight."""
    needs_memory(18)
    k = large(layout, 0.0)
    k[:, -1] = 1
    v = large(layout, 5.0)
    v[:, -1] = 3
    q = torch.ones(1, 2, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        out, sums = torch.ops.effattn.relu_linear_attention_forward(q, k, v, EPS)
    assert (out == 3).all()
    _, grad_k, grad_v = torch.ops.effattn.relu_linear_attention_backward(torch.ones_like(q), q, k, v, sums, EPS)
    assert grad_v.numel() > 2**31
    assert (grad_k == 0).all(), "relu'(0) is 0, and the last key's weight is whatever its size"
    assert (grad_v[:, :-1] == 0).all()
    assert (grad_v[:, -1] == 2).all()
