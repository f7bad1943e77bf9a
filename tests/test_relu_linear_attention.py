"""relu_linear_attention where tests/conformance does not reach: sizes around its tiles, mixed layouts, eps, extremes.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import itertools
import os
import threading

import psutil
import pytest
import torch
from refused import refused
from same import assert_same
from specified import check_against_float64, with_gradients
from swept import swept

from effattn import _library, relu_linear_attention, use_backend
from effattn.ops import OPERATORS
from effattn.testing import LAYOUTS, ORDERS, make_arguments, make_tensor

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise, pytest.mark.usefixtures("poisoned_allocations")]

OPERATOR = OPERATORS["relu_linear_attention"]
DTYPES = OPERATOR.dtypes
EPS = 1e-15
NAMES = ("out", "grad_q", "grad_k", "grad_v")


def sizes(queries, keys, head_dim, value_dim, lead=(2, 3), eps=EPS):
    return {"...": lead, "N": queries, "M": keys, "D": head_dim, "Dv": value_dim, "eps": eps}


def check(case, dtype=torch.float32, order="first", change=None, grad_out=None):
    return check_against_float64(OPERATOR, case, dtype, order, change=change, grad_out=grad_out)


def fused(*arguments, grad_out=None):
    """Output and gradients of the operator under test."""
    return with_gradients(OPERATOR, OPERATOR, arguments, arguments[0].dtype, "first", grad_out).values()


def problem(lead, queries, keys, head_dim, value_dim, dtype, layout):
    shapes = ((queries, head_dim), (keys, head_dim), (keys, value_dim))
    qkv = (make_tensor(*lead, *shape, layout=layout, dtype=dtype, seed=i) for i, shape in enumerate(shapes, start=1))
    return *qkv, EPS


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
@pytest.mark.parametrize("order", ORDERS)
def test_sizes(isa, dtype, size, order):
    check(sizes(*size), dtype, order)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"), [(torch.float32, 16, 24), (torch.float32, 13, 17), (torch.bfloat16, 33, 7)]
)
@pytest.mark.parametrize("tokens", [(37, 41), (600, 530)], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS[:2], repeat=4)), ids="-".join)
def test_every_mix_of_layouts(isa, layouts, tokens, dtype, head_dim, value_dim):
    *of_qkv, of_grad = layouts

    def change(arguments):
        arguments[:3] = [
            make_tensor(*t.shape, layout=layout, dtype=dtype, seed=i)
            for i, (t, layout) in enumerate(zip(arguments[:3], of_qkv, strict=True))
        ]

    case = sizes(*tokens, head_dim, value_dim, (2,))
    check(case, dtype, "first" if of_grad == LAYOUTS[0] else "second", change)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # the narrow types differ in single elements only
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.remainders
def test_every_remainder_of_tokens(isa, order, dtype):
    """Each number of tokens around a vector, a register block and a tile; of keys another than of queries."""
    tile = _library._C.relu_linear_attention_plan(
        groups=1, queries=4096, keys=4096, head_dim=16, value_dim=16, dtype="float32"
    )["tile"]
    tokens = swept(isa, *range(tile - 2, tile + 18), vectors=3)
    for queries, keys in zip(tokens, reversed(tokens), strict=True):
        check(sizes(queries, keys, 16, 16, ()), dtype, order)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.remainders
def test_every_remainder_of_channels(isa, order, dtype):
    channels = swept(isa, 47, 48, 49, vectors=3)
    for head_dim, value_dim in zip(channels, reversed(channels), strict=True):
        check(sizes(20, 23, head_dim, value_dim, ()), dtype, order)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_leading_strides_that_cannot_be_merged(isa, layout):
    """Permuted, with a dimension of one inside, and expanded over the first, the last or all of them."""

    def permuted(t):
        return t.transpose(0, 2).contiguous().transpose(0, 2)

    changes = (
        (permuted, None, None),
        (None, lambda k: k[:1].expand_as(k), None),
        (None, None, lambda v: v[:, :, :1].expand_as(v)),
        (lambda q: q[:1, :, :1].expand_as(q), lambda k: k[:1].expand_as(k), None),
    )
    for functions in changes:

        def change(arguments, functions=functions):
            for i, function in enumerate(functions):
                t = make_tensor(*arguments[i].shape, layout=layout, seed=i)
                arguments[i] = t if function is None else function(t)

        check(sizes(20, 24, 13, 8, (2, 1, 3)), order="second", change=change)


def test_expanded_gradients_and_tokens(isa):
    """What sum().backward() passes back, and one token or one channel for all."""
    for tokens in (37, 2100):
        case = sizes(tokens, tokens, 13, 16, (2,))
        check(case, order="second", grad_out=torch.ones(()).expand(2, tokens, 16))
        for narrow in (lambda v: v[:, :1], lambda v: v[..., :1]):

            def change(arguments, narrow=narrow):
                arguments[2] = narrow(arguments[2]).expand_as(arguments[2])

            check(case, order="second", change=change)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 1, 3), (0,), (3, 0)], ids=str)
def test_leading_dimensions(isa, lead):
    check(sizes(20, 24, 16, 8, lead), order="second")
    check(sizes(0, 0, 0, 0, lead))


def test_strides_of_real_callers(isa):
    """Slices of a fused qkv tensor, heads inside of tokens, and expanded heads: nothing is copied."""

    def sliced(arguments):
        qkv = make_tensor(2, 50, 3 * 4 * 16)
        arguments[:3] = qkv.unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind(0)  # of (3, B, heads, N, D)

    case = sizes(50, 50, 16, 16, (2, 4))
    results = check(case, change=sliced)
    assert results["out"].transpose(1, 2).is_contiguous(), "the reshape to (B, N, C) must be free"
    assert results["grad_q"].transpose(1, 2).is_contiguous()

    def channel_major(arguments):
        arguments[:3] = make_tensor(2, 4, 48, 50).transpose(-1, -2).chunk(3, dim=-1)

    out = check(case, change=channel_major)["out"]
    assert out.transpose(-1, -2).is_contiguous(), "the reshape to (B, C, H, W) must be free"

    def shared(arguments):
        arguments[1:3] = [make_tensor(1, 30, 16).expand(4, 30, 16)] * 2

    check(sizes(20, 30, 16, 16, (4,)), change=shared)


FLOAT16_TOKENS = pytest.mark.parametrize("tokens", [pytest.param(16384, marks=pytest.mark.slow), 2100])


@FLOAT16_TOKENS
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("size", [1e4, 3e4], ids=str)
def test_float16_in_its_whole_range(isa, order, tokens, size):
    """Sums reach 1e14 with the most tokens; the official formulation overflows in float16."""

    def change(arguments):
        arguments[:3] = [(t.float() * size).clamp(-65504, 65504).half() for t in arguments[:3]]
        assert size == 1e4 or arguments[0].abs().max() == 65504

    results = check(sizes(tokens, tokens, 16, 16, (1,)), torch.float16, order, change)
    assert all(result.isfinite().all() for result in results.values())
    assert results["out"].abs().max() > 0


@pytest.mark.parametrize("eps", [EPS, 1e-40], ids=["1e-15", "subnormal"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_queries_whose_relu_is_zero(isa, layout, eps):
    """0 / (0 + eps) is 0, and so are its gradients; not NaN, even if 1 / eps is beyond float32."""
    q, k, v, _ = problem((2,), 70, 70, 16, 16, torch.float32, layout)
    for name, result in zip(NAMES, fused(-q.abs(), k, v, eps), strict=True):
        assert torch.equal(result, torch.zeros_like(result)), name


def test_eps_zero_is_the_plain_quotient(isa):
    def change(arguments):
        arguments[:2] = [t.abs() + 0.1 for t in arguments[:2]]

    check(sizes(45, 45, 16, 16, (2,), 0.0), order="second", change=change)
    q, k, v, _ = problem((2,), 45, 45, 16, 16, torch.float32, "channel_major")
    assert relu_linear_attention(-q.abs(), k, v, eps=0.0).isnan().all(), "0 / 0, as in the plain formulation"


def test_eps_matters(isa):
    check(sizes(45, 45, 16, 16, eps=1.0))
    q, k, v, _ = problem((2,), 45, 45, 16, 16, torch.float32, "token_major")
    assert not torch.allclose(relu_linear_attention(q, k, v, eps=100.0), relu_linear_attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("argument", range(4), ids=["q", "k", "v", "grad_out"].__getitem__)
@pytest.mark.parametrize("dim", [16, 13])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_nan_and_infinity_stay_in_their_group(isa, dtype, value, argument, dim, layout):
    *qkv, _ = problem((2,), 40, 40, dim, dim, dtype, layout)
    tensors = [*(t.clone() for t in qkv), make_tensor(2, 40, dim, layout=layout, dtype=dtype, seed=4)]
    tensors[argument][0, 7, 5] = value
    *qkv, grad_out = tensors
    expected = with_gradients(OPERATOR, OPERATOR.plain, (*qkv, EPS), dtype, "first", grad_out)
    results = with_gradients(OPERATOR, OPERATOR, (*qkv, EPS), dtype, "first", grad_out)
    assert torch.equal(results["out"].isnan(), expected["out"].isnan())
    assert torch.equal(results["out"].isinf(), expected["out"].isinf())
    # Whether a gradient is NaN or infinite depends on the order of the operations; that it is neither does not.
    for name, result in results.items():
        assert torch.equal(result.isfinite(), expected[name].isfinite()), name
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


def check_same_bits(runs, shapes, dtype, head_dim, value_dim, layout):
    """Many chunks of few groups, so that groups are split over threads; and many groups."""
    for lead, tokens in shapes:
        arguments = problem(lead, tokens, tokens, head_dim, value_dim, dtype, layout)

        def everything(arguments=arguments):
            kv_state = torch.ops.effattn.relu_linear_attention_forward(*arguments)[1]
            return bits([*fused(*arguments), kv_state])

        expected = everything()
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for _ in range(runs if count == 2 else 2):
                for name, result, first in zip((*NAMES, "kv_state"), everything(), expected, strict=True):
                    assert torch.equal(result, first), f"{name} with {count} threads"


@pytest.mark.schedule
def test_four_python_threads_at_once(isa):
    arguments = [problem((8,), 700 + i, 700, 16, 16, torch.float32, "channel_major") for i in range(4)]
    expected = [list(fused(*each)) for each in arguments]
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


def test_plans_depend_on_sizes_alone():
    given = {"groups": 4, "queries": 500, "keys": 300, "head_dim": 16, "value_dim": 8, "dtype": "float32"}
    first = _library._C.relu_linear_attention_plan(**given)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert _library._C.relu_linear_attention_plan(**given) == first
    torch.set_num_threads(threads)
    assert first["tile"] % next(row["lanes"] for row in _library._C.isas() if row["name"] == first["isa"]) == 0
    with pytest.raises(ValueError, match="sizes must be >= 0"):
        _library._C.relu_linear_attention_plan(**{**given, "keys": -1})
    with pytest.raises(ValueError, match="dtype: expected"):
        _library._C.relu_linear_attention_plan(**{**given, "dtype": "int8"})


def test_the_plain_formulation_is_the_equation():
    """Against the quadratic form written out."""
    q, k, v = (t.double() for t in problem((2,), 9, 11, 4, 5, torch.float32, "token_major")[:3])
    weights = torch.einsum("bnd,bmd->bnm", q.clamp_min(0), k.clamp_min(0))
    truth = torch.einsum("bnm,bme->bne", weights, v) / (weights.sum(-1, keepdim=True) + EPS)
    assert_same(OPERATOR.plain(q, k, v, EPS), truth)


LARGE = 2**27 + 3  # tokens of 16 channels: offsets pass 2^31
BFLOAT16_ROUNDING = 2.0**-8  # of a result; sums of so many equal powers of two are exact in float32


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
        out, kv_state = torch.ops.effattn.relu_linear_attention_forward(q, k, v, EPS)
    assert out.numel() > 2**31
    assert (out[:, :-1] == 2).all()
    assert (out[:, -1] == 0).all()
    del out
    grad_q, grad_k, grad_v = torch.ops.effattn.relu_linear_attention_backward(grad_out, q, k, v, kv_state, EPS)
    # Every query weighs both keys alike: nothing moves q, a key gains by the difference of v to the mean.
    assert (grad_q == 0).all()
    scale = 0.5 * 16 * (LARGE - 1) / (0.5 * 16 * 2)
    assert torch.allclose(grad_k[0].float(), torch.tensor([[-scale], [scale]]).expand(2, 16), rtol=BFLOAT16_ROUNDING)
    assert torch.allclose(grad_v.float(), torch.full((1, 2, 16), (LARGE - 1) / 2), rtol=BFLOAT16_ROUNDING)


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
        out, kv_state = torch.ops.effattn.relu_linear_attention_forward(q, k, v, EPS)
    assert (out == 3).all()
    _, grad_k, grad_v = torch.ops.effattn.relu_linear_attention_backward(torch.ones_like(q), q, k, v, kv_state, EPS)
    assert grad_v.numel() > 2**31
    assert (grad_k == 0).all(), "relu'(0) is 0, and the last key's weight is whatever its size"
    assert (grad_v[:, :-1] == 0).all()
    assert (grad_v[:, -1] == 2).all()


def test_multi_scale_attention_without_scales(isa):
    aggregation, attention = OPERATORS["multi_scale_aggregation"], OPERATORS["multi_scale_linear_attention"]
    sizes = {"B": 2, "heads": 3, "head_dim": 16, "H": 14, "W": 14, "S": 0, "k": (), "eps": EPS}
    arguments = make_arguments(attention, sizes)
    heads = arguments[0].reshape(2, 3, 48, 196).mT
    expected = relu_linear_attention(*heads.chunk(3, dim=-1)).mT.reshape(2, 48, 14, 14)
    assert torch.equal(attention(*arguments), expected)
    assert torch.equal(aggregation(*arguments[:-1]), arguments[0])


# --- wrong arguments ------------------------------------------------------------------------------------------


Q, K, V = torch.randn(2, 6, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 5)


def linear(q=Q, k=K, v=V, **options):
    return lambda: relu_linear_attention(q, k, v, **options)


WRONG = {
    "list": (linear(q=Q.tolist()), TypeError, "q: expected a torch.Tensor, got list"),
    "rank": (linear(q=Q[0, 0]), ValueError, "q: expected at least 2 dimensions (..., N, D), got shape (4)"),
    "leading": (
        linear(k=K[:1]),
        ValueError,
        "k: expected shape (..., M, D) with ... = (2), M = 7, D = 4, got (1, 7, 4)",
    ),
    "tokens": (
        linear(v=V[:, :6]),
        ValueError,
        "v: expected shape (..., M, Dv) with ... = (2), M = 7, Dv = 5, got (2, 6, 5)",
    ),
    "dtype": (linear(k=K.half()), TypeError, "k: expected the dtype of q, torch.float32, got torch.float16"),
    "boolean": (linear(Q > 0), TypeError, "q: expected float32, bfloat16, float16 or float64, got torch.bool"),
    "complex": (linear(v=V.cfloat()), TypeError, "v: expected the dtype of q, torch.float32, got torch.complex64"),
    "device": (linear(v=V.to("meta")), ValueError, "v: expected the device of q, cpu, got meta"),
    "sparse": (
        linear(k=K.to_sparse()),
        TypeError,
        "k: expected a dense (strided) tensor, got layout torch.sparse_coo",
    ),
    "mkldnn": (linear(Q.to_mkldnn()), TypeError, "q: expected a dense (strided) tensor, got layout torch._mkldnn"),
    "nested": (
        linear(torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged)),
        TypeError,
        "q: expected a dense (strided) tensor, got layout torch.jagged",
    ),
    "huge eps": (linear(eps=1e39), ValueError, "eps: expected a finite float32 >= 0, got 1e+39"),
    "eps beyond a float": (linear(eps=10**400), ValueError, "eps: expected a finite float32 >= 0, got 1000"),
    "eps": (linear(eps=-1e-5), ValueError, "eps: expected a finite float32 >= 0, got -1e-05"),
    "text eps": (linear(eps="small"), TypeError, "eps: expected a number, got str"),
    "no eps": (linear(eps=None), TypeError, "eps: expected a number, got NoneType"),
}


test_what_the_function_says = refused(WRONG)


def test_float64_names_the_way_out():
    with pytest.raises(RuntimeError, match=r"q: expected float32, bfloat16 or float16, got torch\.float64"):
        torch.ops.effattn.relu_linear_attention(Q.double(), K.double(), V.double(), 1e-15)
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu: takes float32, .*, not float64"):
        relu_linear_attention(Q.double(), K.double(), V.double())


def test_the_meta_device_gives_shapes():
    """For those who build models without memory; mixed dtypes are refused in words there too."""
    q, k, v = (t.to("meta") for t in (Q, K, V))
    assert relu_linear_attention(q, k, v).shape == (2, 6, 5)
    with pytest.raises(TypeError, match="k: expected the dtype of q"):
        relu_linear_attention(q, k.half(), v)


def test_empty_tensors_may_claim_any_size():
    """Nothing is allocated for them, but head_dim * value_dim counts the kernels' memory and must not overflow."""
    wide, wider = torch.empty(0, 2**30), torch.empty(0, 2**31)
    with pytest.raises(RuntimeError, match="q, v: expected at most 65536 channels, got 1073741824 and 2147483648"):
        torch.ops.effattn.relu_linear_attention(wide, wide, wider, 1e-15)
    many = torch.empty(2**40, 0, 4)
    assert relu_linear_attention(many, many, many).shape == many.shape


def test_more_channels_than_the_kernels_take():
    q, v = make_tensor(2, 2**16 + 1), make_tensor(2, 3)
    assert torch.equal(relu_linear_attention(q, q, v), OPERATOR.plain(q, q, v, 1e-15))
    with use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: takes heads of up to 65536 channels, not 65537"):
        relu_linear_attention(q, q, v)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_more_elements_than_can_be_counted(device):
    """Of arguments that have none: the output's strides would be beyond an int64."""
    q, k, v = (torch.empty(0, *size, device=device) for size in ((2**62, 1), (1, 1), (1, 4)))
    with pytest.raises(RuntimeError, match=r"elements can be counted, not one of shape \(0, 4611686018427387904, 4\)"):
        torch.ops.effattn.relu_linear_attention(q, k, v, 1e-5)
