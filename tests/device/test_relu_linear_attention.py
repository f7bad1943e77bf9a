"""relu_linear_attention on GPUs, as its kernels are made: sizes around tiles, sums in parts, strides, no eps."""

from __future__ import annotations

import pytest
import torch
from cuda_only import SCALARS, cuda_only, workspace_of_inference
from limits import check_that_a_limit_is_named
from specified import check_against_float64, expected, mapped, with_gradients
from tiers import full

from effattn._triton import configs
from effattn._triton.configs import MIN_TOKENS
from effattn.ops import OPERATORS
from effattn.testing import ORDERS, make_arguments, moved
from effattn.tolerance import GPU_ROUNDINGS, error

pytestmark = [pytest.mark.each_value, pytest.mark.usefixtures("device", "poisoned_allocations")]

OPERATOR = OPERATORS["relu_linear_attention"]
NARROW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *NARROW)
CONTIGUOUS = ("first", "second")


def case(queries, keys, head_dim, value_dim, lead=(2,), eps=1e-15):
    return {"...": lead, "N": queries, "M": keys, "D": head_dim, "Dv": value_dim, "eps": eps}


def away_from_zero(arguments):
    """Of so many numbers some are as near to zero as rounding errors, and then it is rounding that opens a relu."""
    for i in (0, 1):
        t = arguments[i]
        arguments[i] = torch.where(t.abs() < 2.0**-10, 2.0**-10, t)


SIZES = [  # (queries, keys, head_dim, value_dim)
    (130, 196, 16, 16),
    (49, 49, 32, 32),
    (5, 300, 7, 9),
    (130, 17, 33, 20),
    (34, 40, 128, 128),
    (1, 2, 2, 1),
    (70, 65, 8, 64),
]


@pytest.mark.memcheck
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.numerics
def test_sizes_around_tiles(device, backend, size, order, dtype):
    check_against_float64(OPERATOR, case(*size), dtype, order, backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.numerics
def test_sums_in_several_parts(device, backend, dtype):
    """Few groups and many tokens: parts of their own, the last of them short."""
    tokens = 4 * MIN_TOKENS + 37
    sizes = case(tokens, tokens - 5, 16, 24, ())
    check_against_float64(OPERATOR, sizes, dtype, "second", backend, device, away_from_zero)


@cuda_only
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("tokens", [4104, 4109], ids=["vectors", "elements"])
@pytest.mark.parametrize("order", CONTIGUOUS)
def test_many_tokens_of_narrow_types(device, backend, dtype, order, tokens):
    """More than one block does at once: kernels that load vectors alone, and those that take anything."""
    channels = 16 if tokens == 4104 else 12
    sizes = case(tokens, tokens, channels, channels, ())
    check_against_float64(OPERATOR, sizes, dtype, order, backend, device, away_from_zero)


@cuda_only
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("channels", [(32, 40), (128, 72)], ids=str)
@pytest.mark.parametrize("order", CONTIGUOUS)
def test_wide_heads_of_narrow_types(device, backend, dtype, order, channels):
    tokens = 520 if channels[0] == 128 else 4104  # at most what a cluster does at once
    sizes = case(tokens, tokens, *channels, ())
    check_against_float64(OPERATOR, sizes, dtype, order, backend, device, away_from_zero)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_long_sum_in_one_part(device, backend, monkeypatch):
    """What each program does where there are more groups than a GPU runs at once."""
    monkeypatch.setattr(configs, "PROGRAMS", 1)
    sizes = case(70, 3000, 16, 16, ())
    check_against_float64(OPERATOR, sizes, torch.float32, "second", backend, device, away_from_zero)


@cuda_only
def test_a_sum_longer_than_a_chain(device, backend):
    """So many tokens that a warp's sums of a narrow type leave the registers more than once."""
    sizes, dtype = case(1, 280_000, 4, 4, ()), torch.bfloat16
    arguments, truth, allowed = expected(OPERATOR, sizes, dtype, roundings=GPU_ROUNDINGS, change=away_from_zero)
    with torch.no_grad():
        out = OPERATOR(*mapped(lambda t: t.to(device), arguments))
    assert error(out.cpu(), truth["out"]) <= allowed["out"]


def permuted(t, *dims):
    """The same sizes, other strides: what was ``dims[0]`` in memory is ``dims[1]``."""
    return t.transpose(*dims).contiguous().transpose(*dims)


#: By name, what is done with q, k and v of leading sizes (2, 1, 3).
LEADING = {
    "permuted": (lambda q: permuted(q, 0, 2), lambda k: k, lambda v: v),
    "expanded first": (lambda q: q, lambda k: k[:1].expand_as(k), lambda v: v),
    "expanded last": (lambda q: q, lambda k: k, lambda v: v[:, :, :1].expand_as(v)),
    "expanded": (
        lambda q: q[:1, :, :1].expand_as(q),
        lambda k: k[:1].expand_as(k),
        lambda v: v[:, :, :1].expand_as(v),
    ),
}


@pytest.mark.parametrize("order", CONTIGUOUS)
@pytest.mark.parametrize("name", LEADING)
def test_leading_strides_that_cannot_be_merged(device, backend, order, name):
    def change(arguments):
        arguments[:3] = [lay(t) for lay, t in zip(LEADING[name], arguments[:3], strict=True)]

    check_against_float64(OPERATOR, case(20, 24, 13, 8, (2, 1, 3)), torch.float32, order, backend, device, change)


@pytest.mark.parametrize("order", ["first", full("second")])
def test_more_dimensions_than_kernels_address(device, backend, order):
    def change(arguments):
        for i in range(3):
            arguments[i] = permuted(arguments[i], i, i + 2)

    sizes = case(5, 6, 4, 3, (2,) * 5)
    check_against_float64(OPERATOR, sizes, torch.float32, order, backend, device, change)


@cuda_only
def test_the_most_dimensions(device, backend):
    """That CUDA's kernels address, in reverse order; the forward alone, since there are many groups."""
    dims = (*reversed(range(12)), 12, 13)

    def change(arguments):
        arguments[:3] = [t.permute(dims).contiguous().permute(dims) for t in arguments[:3]]

    sizes = case(3, 3, 2, 2, (2,) * 12)
    arguments, truth, allowed = expected(OPERATOR, sizes, torch.float32, roundings=GPU_ROUNDINGS, change=change)
    with torch.no_grad():
        out = OPERATOR(*mapped(lambda t: moved(t, device), arguments))
    assert error(out.cpu(), truth["out"]) <= allowed["out"]


@cuda_only
def test_more_dimensions_are_refused(device, backend):
    def change(arguments):
        arguments[:3] = [permuted(t, 0, 1) for t in arguments[:3]]

    limit = "tensors of up to 14 dimensions, not 15"
    check_that_a_limit_is_named(OPERATOR, case(1, 1, 2, 2, (2,) * 13), backend, device, limit, change)


@pytest.mark.parametrize("channels", [(129, 3), (4, 129)], ids=["head_dim", "value_dim"])
def test_wider_heads_are_refused(device, backend, ops, channels):
    limit = "heads of up to 128 channels, not 129"
    check_that_a_limit_is_named(OPERATOR, case(5, 5, *channels), backend, device, limit, ops=ops)


@pytest.mark.parametrize("eps", [1e-15, 1e-40], ids=["1e-15", "subnormal"])
def test_queries_whose_relu_is_zero(device, eps):
    """0 / (0 + eps) is 0, and so are its gradients; not NaN, even if 1 / eps is beyond float32."""
    q, k, v, _ = make_arguments(OPERATOR, case(70, 70, 16, 16))
    arguments = mapped(lambda t: t.to(device), [-q.abs(), k, v, eps])
    for name, result in with_gradients(OPERATOR, OPERATOR, arguments, torch.float32).items():
        assert torch.equal(result, torch.zeros_like(result)), name


def test_eps_zero_is_the_plain_quotient(device, backend):
    def change(arguments):
        arguments[:2] = [t.abs() + 0.1 for t in arguments[:2]]

    check_against_float64(OPERATOR, case(45, 45, 16, 16, eps=0.0), torch.float32, "first", backend, device, change)
    q, k, v, eps = mapped(lambda t: t.to(device), make_arguments(OPERATOR, case(45, 45, 16, 16, eps=0.0)))
    out = OPERATOR(-q.abs(), k, v, eps)
    assert (out[0] if isinstance(out, tuple) else out).isnan().all(), "0 / 0, as in the reference"


#: Sums over tokens that are added up, at most: tokens are split into no more parts (kMaxParts of reduction.cu).
PARTS = 64


@cuda_only
@pytest.mark.parametrize(("tokens", "parts"), [(49, 0), (9000, 1 + PARTS)], ids=["few", "many"])
def test_workspace_of_inference(device, backend, tokens, parts):
    """None where a block does all tokens."""
    arguments = mapped(lambda t: t.to(device), make_arguments(OPERATOR, case(tokens, tokens, 8, 8, (2, 1))))
    sums = 4 * 2 * 8 * (8 + 1)
    assert 0 <= workspace_of_inference(OPERATOR, arguments, device) <= parts * sums + SCALARS


def test_what_is_measured_lies_as_in_models():
    """Channel-major views of one tensor, as convolutions leave it; or as diffusers has it, tokens first."""
    pytest.importorskip("tabulate")
    from benchmarks.gpu.relu_linear_attention import MEASURED

    of_convolutions, of_diffusers = (MEASURED.case(shape, training=False).make() for shape in MEASURED.tiny)
    q, k, _ = of_diffusers
    assert q.shape == (1, 2, 9, 8) and q.stride() == (9 * 16, 8, 16, 1) and not torch.equal(q, k)
    q, k, _ = of_convolutions
    assert q.shape == (1, 2, 9, 8) and q.stride() == (2 * 24 * 9, 24 * 9, 1, 9)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
