"""Wrong arguments: a named error from the function, a RuntimeError from the operator, never a crash."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn import _library, relu_linear_attention, use_backend

pytestmark = pytest.mark.arguments

OPS = torch.ops.effattn
Q, K, V = torch.randn(2, 6, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 5)


def quantised():
    return torch.quantize_per_tensor(Q, 0.1, 0, torch.qint8)


BAD = {
    "list": ((Q.tolist(), K, V), {}, TypeError, "q: expected a torch.Tensor, got list"),
    "none": ((Q, None, V), {}, TypeError, "k: expected a torch.Tensor, got NoneType"),
    "rank": ((Q[0, 0], K, V), {}, ValueError, r"q: expected at least 2 dimensions .* got shape \(4,\)"),
    "rank of v": ((Q, K, V[0]), {}, ValueError, r"v: expected the leading sizes of q, \(2,\), got shape \(7, 5\)"),
    "leading": ((Q, K[:1], V), {}, ValueError, r"k: expected the leading sizes of q, \(2,\), got shape \(1, 7, 4\)"),
    "head_dim": ((Q, K[..., :3], V), {}, ValueError, r"k: expected the head_dim of q, 4, got shape \(2, 7, 3\)"),
    "tokens": ((Q, K, V[:, :6]), {}, ValueError, r"v: expected as many tokens as k, 7, got shape \(2, 6, 5\)"),
    "dtype of k": ((Q, K.half(), V), {}, TypeError, "k: expected the dtype of q, torch.float32, got torch.float16"),
    "dtype of v": ((Q, K, V.double()), {}, TypeError, "v: expected the dtype of q, torch.float32, got torch.float64"),
    "integer": ((Q.long(), K.long(), V.long()), {}, TypeError, "q: expected float16, .*, got torch.int64"),
    "boolean": ((Q > 0, K, V), {}, TypeError, "q: expected float16, .*, got torch.bool"),
    "complex": ((Q, K, V.cfloat()), {}, TypeError, "v: expected float16, .*, got torch.complex64"),
    "float8": ((Q.to(torch.float8_e4m3fn), K, V), {}, TypeError, "q: expected float16, .* torch.float8_e4m3fn"),
    "device": ((Q, K, V.to("meta")), {}, ValueError, "v: expected the device of q, cpu, got meta"),
    "sparse": ((Q, K.to_sparse(), V), {}, TypeError, "k: expected a dense .* got layout torch.sparse_coo"),
    "csr": ((Q[0].to_sparse_csr(), K[0], V[0]), {}, TypeError, "q: expected a dense .* got layout torch.sparse_csr"),
    "mkldnn": ((Q.to_mkldnn(), K, V), {}, TypeError, "q: expected a dense .* got layout torch._mkldnn"),
    "quantised": ((quantised(), K, V), {}, TypeError, "q: expected float16, .* got torch.qint8"),
    "nested": (
        (torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged), K, V),
        {},
        TypeError,
        "q: expected a dense .* got layout torch.jagged",
    ),
    "negative eps": ((Q, K, V), {"eps": -1e-5}, ValueError, "eps: expected a finite number >= 0, got -1e-05"),
    "nan eps": ((Q, K, V), {"eps": float("nan")}, ValueError, "eps: expected a finite number >= 0, got nan"),
    "infinite eps": ((Q, K, V), {"eps": float("inf")}, ValueError, "eps: expected a finite number >= 0, got inf"),
    "text eps": ((Q, K, V), {"eps": "small"}, TypeError, "eps: expected a number, got str"),
    "no eps": ((Q, K, V), {"eps": None}, TypeError, "eps: expected a number, got NoneType"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_the_function_names_the_argument(name, backend):
    arguments, options, error, message = BAD[name]
    with use_backend(backend), pytest.raises(error, match=message):
        relu_linear_attention(*arguments, **options)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BAD)
def test_the_operator_raises_too(name):
    arguments, options, _, _ = BAD[name]
    for op in (OPS.relu_linear_attention, OPS.relu_linear_attention_forward):
        with pytest.raises(RuntimeError):
            op(*arguments, options.get("eps", 1e-15))


def test_float64_names_the_way_out():
    with pytest.raises(RuntimeError, match="q must be float32, bfloat16 or float16 for the cpu backend"):
        OPS.relu_linear_attention(Q.double(), K.double(), V.double(), 1e-15)
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu: takes float32, .*, not float64"):
        relu_linear_attention(Q.double(), K.double(), V.double())


@pytest.mark.parametrize(
    ("argument", "wrong", "message"),
    [
        (0, torch.randn(2, 6, 4), r"grad_out must have shape \(2, 6, 5\), got \(2, 6, 4\)"),
        (0, torch.randn(2, 6, 5).half(), "grad_out must have the dtype of q"),
        (4, torch.randn(2, 5, 4), r"sums must have shape \(2, 6, 4\), got \(2, 5, 4\)"),
        (4, torch.randn(2, 6, 4).half(), "sums must be float32"),
        (4, torch.randn(2, 4, 6).transpose(-1, -2), "sums must be contiguous"),
    ],
)
def test_the_backward_operator_checks_its_own(argument, wrong, message):
    out, sums = OPS.relu_linear_attention_forward(Q, K, V, 1e-15)
    arguments = [out, Q, K, V, sums]
    arguments[argument] = wrong
    with pytest.raises(RuntimeError, match=message):
        OPS.relu_linear_attention_backward(*arguments, 1e-15)


sizes = st.lists(st.integers(0, 4), min_size=0, max_size=4)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool])


@st.composite
def tensors(draw):
    """Any small tensor: sizes, dtype, permuted, expanded, sliced, sparse, or on the meta device."""
    t = torch.zeros(draw(sizes)).to(draw(dtypes))
    for change in draw(st.lists(st.sampled_from(["permute", "expand", "slice", "sparse", "meta"]), max_size=2)):
        if change == "permute" and t.layout == torch.strided:
            t = t.permute(draw(st.permutations(range(t.dim()))))
        elif change == "expand" and t.layout == torch.strided:
            t = t.expand(draw(st.integers(0, 3)), *t.shape)
        elif change == "slice" and t.dim() and t.layout == torch.strided:
            t = t[..., ::2]
        elif change == "sparse" and t.dim() and t.device.type == "cpu" and t.layout == torch.strided:
            t = t.to_sparse()
        elif change == "meta":
            t = t.to("meta")
    return t


#: Mostly arguments that almost fit, so that every check is reached, and now and then anything at all.
@st.composite
def almost_fitting(draw):
    lead, n, m, d, e = draw(st.lists(st.integers(0, 3), max_size=2)), *(draw(st.integers(0, 20)) for _ in range(4))
    dtype = draw(dtypes)
    arguments = [torch.ones(*lead, *size).to(dtype) for size in ((n, d), (m, d), (m, e))]
    if draw(st.booleans()):
        arguments[draw(st.integers(0, 2))] = draw(tensors())
    eps = draw(st.one_of(st.just(1e-15), st.floats(), st.integers(-2, 2)))
    return *arguments, eps


@settings(deadline=None)
@given(st.one_of(almost_fitting(), st.tuples(tensors(), tensors(), tensors(), st.floats())))
def test_fuzz_the_function(arguments):
    *qkv, eps = arguments
    try:
        out = relu_linear_attention(*qkv, eps=eps)
    except (ValueError, TypeError) as error:
        assert str(error).split(":")[0] in ("q", "k", "v", "eps")
    else:
        q, k, v = qkv
        assert out.shape == (*q.shape[:-1], v.shape[-1])
        assert k.shape[-1] == q.shape[-1] and v.shape[-2] == k.shape[-2]
        assert out.dtype == q.dtype


@settings(deadline=None)
@given(st.one_of(almost_fitting(), st.tuples(tensors(), tensors(), tensors(), st.floats())))
def test_fuzz_the_operators(arguments):
    *qkv, eps = arguments
    try:
        out, sums = OPS.relu_linear_attention_forward(*qkv, float(eps))
    except RuntimeError:
        pass
    else:
        grads = OPS.relu_linear_attention_backward(out, *qkv, sums, float(eps))
        assert [g.shape for g in grads] == [t.shape for t in qkv]


@settings(deadline=None)
@given(almost_fitting(), tensors(), tensors())
def test_fuzz_the_backward_operator(arguments, grad_out, sums):
    *qkv, eps = arguments
    try:
        OPS.relu_linear_attention_backward(grad_out, *qkv, sums, float(eps))
    except RuntimeError:
        pass
    else:
        assert grad_out.shape == (*qkv[0].shape[:-1], qkv[2].shape[-1])


def test_the_meta_device_gives_shapes():
    """For those who build models without memory; mixed dtypes are refused in words there too."""
    q, k, v = (t.to("meta") for t in (Q, K, V))
    assert relu_linear_attention(q, k, v).shape == (2, 6, 5)
    with pytest.raises(TypeError, match="k: expected the dtype of q"):
        relu_linear_attention(q, k.half(), v)


def test_empty_tensors_may_claim_any_size():
    """Nothing is allocated for them, but head_dim * value_dim counts the kernels' memory and must not overflow."""
    wide, wider = torch.empty(0, 2**30), torch.empty(0, 2**31)
    with pytest.raises(RuntimeError, match="head_dim and value_dim must be at most"):
        relu_linear_attention(wide, wide, wider)
    many = torch.empty(2**40, 0, 4)
    assert relu_linear_attention(many, many, many).shape == many.shape


OUT_OF_MEMORY = """
import resource, torch
from effattn import relu_linear_attention
t = torch.ones(3, 1, 2**14)
relu_linear_attention(t[:, :, :4], t[:, :, :4], t[:, :, :4])  # threads have their stacks now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
try:
    relu_linear_attention(t, t, t)  # sums of 1 GiB
except RuntimeError as error:
    assert "effattn: cannot allocate" in str(error), error
    assert relu_linear_attention(t[:, :, :4], t[:, :, :4], t[:, :, :4]).eq(1).all()
    print("refused")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory as Linux does")
@pytest.mark.skipif(_library._C.build["sanitizer"] != "", reason="an address sanitizer reserves the address space")
def test_too_little_memory_is_a_runtime_error():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
