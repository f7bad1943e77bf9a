"""What the public functions say of wrong arguments; every argument of every operator is in tests/conformance."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import effattn
from effattn import _library, use_backend
from effattn.testing import BiasedCase, CascadeCase, MultiScaleCase

Q, K, V = torch.randn(2, 6, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 5)
SCALES = MultiScaleCase(2, 2, 4, 5, 6, kernels=(3, 5), biases=True)
BIASED = BiasedCase(2, 3, 5, 6, 4, 8, talking=True)
CASCADE = CascadeCase(2, 8, 4, 5, 6, 3, (3, 5))


def linear(q=Q, k=K, v=V, **options):
    return lambda: effattn.relu_linear_attention(q, k, v, **options)


def scales(function=effattn.multi_scale_linear_attention, head_dim=SCALES.head_dim, options=None, **changed):
    return lambda: function(*(SCALES.inputs() | changed).values(), head_dim=head_dim, **(options or {}))


def biased(scale=None, **changed):
    *arguments, talking_heads = (BIASED.inputs() | changed).values()
    return lambda: effattn.biased_attention(*arguments, scale=scale, talking_heads=talking_heads)


def cascade(scale=None, window_size=3, **changed):
    arguments = (CASCADE.inputs() | changed).values()
    return lambda: effattn.cascaded_group_attention(*arguments, scale=scale, window_size=window_size)


def with_element(inputs, name, element, value):
    return {name: [value if i == element else t for i, t in enumerate(inputs[name])]}


X = CASCADE.inputs()["x"]
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
    "boolean": (linear(Q > 0), TypeError, "q: expected float16, bfloat16, float32 or float64, got torch.bool"),
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
    "eps": (linear(eps=-1e-5), ValueError, "eps: expected a finite number >= 0, got -1e-05"),
    "text eps": (linear(eps="small"), TypeError, "eps: expected a number, got str"),
    "no eps": (linear(eps=None), TypeError, "eps: expected a number, got NoneType"),
    "channels": (
        scales(qkv=SCALES.inputs()["qkv"][:, :23]),
        ValueError,
        "qkv: expected shape (B, 3 * heads * head_dim, H, W) with B = 2, heads = 2, head_dim = 4, "
        "H = 5, W = 6, got (2, 23, 5, 6)",
    ),
    "head_dim": (scales(head_dim=0), ValueError, "head_dim: expected an int >= 1, got 0"),
    "head_dim float": (scales(head_dim=4.0), TypeError, "head_dim: expected an int, got float"),
    "scales": (
        scales(effattn.multi_scale_aggregation, pw_weights=SCALES.inputs()["pw_weights"][:1]),
        ValueError,
        "pw_weights: expected S = 2 tensors, got 1",
    ),
    "no weights": (
        scales(dw_weights=None),
        TypeError,
        "dw_weights: expected a sequence of tensors, got NoneType",
    ),
    "even kernel": (
        scales(**with_element(SCALES.inputs(), "dw_weights", 1, torch.ones(24, 1, 4, 4))),
        ValueError,
        "dw_weights[1]: expected an odd k in (3 * heads * head_dim, 1, k, k), got shape (24, 1, 4, 4)",
    ),
    "oblong kernel": (
        scales(**with_element(SCALES.inputs(), "dw_weights", 0, torch.ones(24, 1, 5, 3))),
        ValueError,
        "dw_weights[0]: expected shape (3 * heads * head_dim, 1, k, k) with heads = 2, head_dim = 4, k = 5, "
        "got (24, 1, 5, 3)",
    ),
    "weight dtype": (
        scales(**with_element(SCALES.inputs(), "dw_weights", 0, torch.ones(24, 1, 3, 3).half())),
        TypeError,
        "dw_weights[0]: expected the dtype of qkv, torch.float32, or float32, got torch.float16",
    ),
    "scale eps": (scales(options={"eps": -1.0}), ValueError, "eps: expected a finite number >= 0, got -1.0"),
    "bias": (
        biased(bias=torch.ones(3, 6, 5)),
        ValueError,
        "bias: expected shape (heads, N, M) with heads = 3, N = 5, M = 6, got (3, 6, 5)",
    ),
    "mixing": (
        biased(talking_heads=torch.ones(3, 3)),
        TypeError,
        "talking_heads: expected a sequence of tensors, got Tensor",
    ),
    "mixing length": (
        biased(talking_heads=[torch.ones(3, 3)]),
        ValueError,
        "talking_heads: expected none or 4 tensors, got 1",
    ),
    "no heads": (cascade(qkv_weights=[]), ValueError, "qkv_weights: expected at least one tensor, got none"),
    "kernels": (
        cascade(q_dw_weights=[torch.ones(4, 1, 3, 3)]),
        ValueError,
        "q_dw_weights: expected heads = 2 tensors, got 1",
    ),
    "groups": (
        cascade(x=X[:, :7]),
        ValueError,
        "x: expected shape (B, heads * d, H, W) with B = 2, heads = 2, d = 4, H = 5, W = 6, got (2, 7, 5, 6)",
    ),
    "attention_bias": (
        cascade(attention_bias=torch.ones(2, 4, 4)),
        ValueError,
        "attention_bias: expected shape (heads, window_height * window_width, window_height * window_width) with "
        "heads = 2, window_height = 3, window_width = 3, got (2, 4, 4)",
    ),
    "window": (cascade(window_size=0), ValueError, "window_height: expected an int >= 1 and <= 32767, got 0"),
    "window huge": (cascade(window_size=(2**62, 4)), ValueError, "window_height: expected an int >= 1 and <= 32767"),
    "window float": (
        cascade(window_size=3.0),
        TypeError,
        "window_height: expected an int, got float",
    ),
    "window of three": (
        cascade(window_size=(3, 3, 3)),
        ValueError,
        "window_size: expected an int, two of them or None",
    ),
    "scale": (cascade(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
    "scale text": (biased(scale="1"), TypeError, "scale: expected a number, got str"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_the_function_says(name, backend):
    call, error, text = WRONG[name]
    with use_backend(backend), pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(text)


def test_float64_names_the_way_out():
    with pytest.raises(RuntimeError, match="q: expected float32, bfloat16 or float16 for the cpu backend"):
        torch.ops.effattn.relu_linear_attention(Q.double(), K.double(), V.double(), 1e-15)
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu: takes float32, .*, not float64"):
        effattn.relu_linear_attention(Q.double(), K.double(), V.double())


def test_the_meta_device_gives_shapes():
    """For those who build models without memory; mixed dtypes are refused in words there too."""
    q, k, v = (t.to("meta") for t in (Q, K, V))
    assert effattn.relu_linear_attention(q, k, v).shape == (2, 6, 5)
    with pytest.raises(TypeError, match="k: expected the dtype of q"):
        effattn.relu_linear_attention(q, k.half(), v)


def test_more_scales_than_the_kernels_take():
    case = MultiScaleCase(1, 1, 4, 5, 6, kernels=(3,) * 9)
    inputs = case.inputs()
    with use_backend("reference"):
        expected = case.call(effattn.multi_scale_aggregation, inputs)
    assert torch.equal(case.call(effattn.multi_scale_aggregation, inputs), expected)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: takes up to 8 scales, not 9"):
        case.call(effattn.multi_scale_aggregation, inputs)
    with pytest.raises(RuntimeError, match="dw_weights: expected at most 8 scales, got 9"):
        torch.ops.effattn.multi_scale_aggregation(*inputs.values(), case.head_dim)


def test_empty_tensors_may_claim_any_size():
    """Nothing is allocated for them, but head_dim * value_dim counts the kernels' memory and must not overflow."""
    wide, wider = torch.empty(0, 2**30), torch.empty(0, 2**31)
    with pytest.raises(RuntimeError, match="q, v: expected at most 65536 channels, got 1073741824 and 2147483648"):
        effattn.relu_linear_attention(wide, wide, wider)
    many = torch.empty(2**40, 0, 4)
    assert effattn.relu_linear_attention(many, many, many).shape == many.shape


OUT_OF_MEMORY = """
import resource, torch
from effattn import relu_linear_attention
t = torch.ones(3, 1, 2**14)
relu_linear_attention(t[:, :, :4], t[:, :, :4], t[:, :, :4])  # threads have their stacks now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
try:
    relu_linear_attention(t, t, t)  # kv_state of 1 GiB
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
