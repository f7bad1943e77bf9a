"""Wrong arguments of biased_attention and cascaded_group_attention: a named error, and no crash of the operators."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn import biased_attention, cascaded_group_attention, use_backend
from effattn.testing import BiasedCase, CascadeCase

pytestmark = pytest.mark.arguments

OPS = torch.ops.effattn
BIASED = BiasedCase(2, 3, 5, 6, 4, 8, talking=True)
CASCADE = CascadeCase(2, 8, 4, 5, 6, 3, (3, 5))


def changed(case, name, value, at=None):
    inputs = case.inputs()
    if at is None:
        inputs[name] = value
    else:
        inputs[name][at] = value
    return inputs


Q = BIASED.inputs()["q"]
BAD_BIASED = {
    "q list": (("q", [1.0]), TypeError, "q: expected a torch.Tensor, got list"),
    "q rank": (("q", Q[0]), ValueError, r"q: expected 4 dimensions .* got shape \(3, 5, 4\)"),
    "q integer": (("q", Q.long()), TypeError, "q: expected float16, .*, got torch.int64"),
    "k dtype": (("k", torch.ones(2, 3, 6, 4).double()), TypeError, "k: expected the dtype of q, torch.float32"),
    "k head_dim": (
        ("k", torch.ones(2, 3, 6, 5)),
        ValueError,
        r"k: expected the head_dim of q, 4, got shape \(2, 3, 6, 5",
    ),
    "k heads": (("k", torch.ones(2, 2, 6, 4)), ValueError, r"k: expected the leading sizes of q, \(2, 3\)"),
    "v tokens": (("v", torch.ones(2, 3, 7, 8)), ValueError, "v: expected as many tokens as k, 6"),
    "bias shape": (("bias", torch.ones(3, 6, 5)), ValueError, r"bias: expected shape \(3, 5, 6\), got \(3, 6, 5\)"),
    "bias rank": (("bias", torch.ones(5, 6)), ValueError, "bias: expected at least 3 dimensions"),
    "bias None": (("bias", None), TypeError, "bias: expected a torch.Tensor, got NoneType"),
    "bias dtype": (("bias", torch.ones(3, 5, 6).half()), TypeError, "bias: expected the dtype of q, torch.float32"),
    "mixing tensor": (("talking_heads", torch.ones(3, 3)), TypeError, "talking_heads: expected a sequence of tensors"),
    "mixing length": (
        ("talking_heads", [torch.ones(3, 3)]),
        ValueError,
        "talking_heads: expected two matrices.* got 1",
    ),
    "mixing matrix": (
        ("talking_heads", torch.ones(4, 4), 2),
        ValueError,
        r"talking_heads\[2\]: expected shape \(3, 3\), got \(4, 4\)",
    ),
    "mixing bias": (("talking_heads", torch.ones(4), 1), ValueError, r"talking_heads\[1\]: expected shape \(3,\)"),
}


@pytest.mark.parametrize("name", BAD_BIASED)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_biased_attention(name, backend):
    change, error, message = BAD_BIASED[name]
    inputs = changed(BIASED, *change)
    arguments = [inputs[name] for name in ("q", "k", "v", "bias")]
    with use_backend(backend), pytest.raises(error, match=message):
        biased_attention(*arguments, talking_heads=inputs["talking_heads"])


X = CASCADE.inputs()["x"]
BAD_CASCADE = {
    "x None": (("x", None), {}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    "x rank": (("x", X[0]), {}, ValueError, r"x: expected 4 dimensions \(B, C, H, W\), got shape \(8, 5, 6\)"),
    "x channels": (("x", X[:, :7]), {}, ValueError, r"x: expected a multiple of 2 channels, one group a head"),
    "x other channels": (("x", X[:, :6]), {}, ValueError, r"qkv_weights\[0\]: expected shape \(11, 3, 1, 1\)"),
    "no heads": (("qkv_weights", []), {}, ValueError, "q.*: expected a tensor a head"),
    "one tensor": (("qkv_weights", X), {}, TypeError, "qkv_weights: expected a sequence of tensors, got Tensor"),
    "qkv None": (("qkv_weights", None, 1), {}, TypeError, r"qkv_weights\[1\]: expected a torch.Tensor, got NoneType"),
    "kernel None": (("q_dw_weights", None, 1), {}, TypeError, r"q_dw_weights\[1\]: expected a torch.Tensor, got None"),
    "kernels": (("q_dw_weights", [torch.ones(4, 1, 3, 3)]), {}, ValueError, "q_dw_weights: .* 2, got 1"),
    "biases": (
        ("qkv_biases", [torch.ones(12)] * 3),
        {},
        ValueError,
        "qkv_biases: expected a tensor a head .* 2, got 3",
    ),
    "even kernel": (
        ("q_dw_weights", torch.ones(4, 1, 4, 4), 1),
        {},
        ValueError,
        r"q_dw_weights\[1\]: expected an odd kernel size, got shape \(4, 1, 4, 4\)",
    ),
    "oblong kernel": (
        ("q_dw_weights", torch.ones(4, 1, 5, 3), 1),
        {},
        ValueError,
        r"q_dw_weights\[1\]: expected shape",
    ),
    "key_dim": (
        ("q_dw_weights", torch.ones(3, 1, 5, 5), 1),
        {},
        ValueError,
        r"q_dw_weights\[1\]: expected shape \(4, 1",
    ),
    "qkv bias": (
        ("qkv_biases", torch.ones(3), 0),
        {},
        ValueError,
        r"qkv_biases\[0\]: expected shape \(12,\), got \(3,\)",
    ),
    "dw bias": (
        ("q_dw_biases", torch.ones(3), 0),
        {},
        ValueError,
        r"q_dw_biases\[0\]: expected shape \(4,\), got \(3,\)",
    ),
    "weight dtype": (
        ("qkv_weights", torch.ones(12, 4, 1, 1).half(), 1),
        {},
        TypeError,
        r"qkv_weights\[1\]: .* float32",
    ),
    "attention_bias": (
        ("attention_bias", torch.ones(2, 4, 4)),
        {},
        ValueError,
        r"attention_bias: expected shape \(2, 9, 9\), got \(2, 4, 4\)",
    ),
    "window 0": (None, {"window_size": 0}, ValueError, "window_size: expected positive numbers below 32768, got 0"),
    "window huge": (None, {"window_size": (2**62, 4)}, ValueError, "expected positive numbers below 32768, got"),
    "window float": (
        None,
        {"window_size": 3.0},
        TypeError,
        "window_size: expected an int, two of them or None, got 3.0",
    ),
    "window of three": (None, {"window_size": (3, 3, 3)}, TypeError, "window_size: expected an int, two of them"),
    "scale": (None, {"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    "scale text": (None, {"scale": "1"}, TypeError, "scale: expected a number or None, got str"),
}


@pytest.mark.parametrize("name", BAD_CASCADE)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_cascaded_group_attention(name, backend):
    change, options, error, message = BAD_CASCADE[name]
    inputs = CASCADE.inputs() if change is None else changed(CASCADE, *change)
    with use_backend(backend), pytest.raises(error, match=message):
        cascaded_group_attention(*inputs.values(), **{"window_size": 3, **options})


NOT_TENSORS = (
    "q list",
    "bias None",
    "mixing tensor",
    "x None",
    "one tensor",
    "qkv None",
    "kernel None",
)  # no operator is called with these


@pytest.mark.parametrize("name", [name for name in BAD_BIASED if name not in NOT_TENSORS])
def test_the_operator_refuses_too(name):
    inputs = changed(BIASED, *BAD_BIASED[name][0])
    with pytest.raises(RuntimeError):
        OPS.biased_attention(*inputs.values(), 0.5)


@pytest.mark.parametrize("name", [name for name, bad in BAD_CASCADE.items() if bad[0] and name not in NOT_TENSORS])
def test_the_cascade_operators_refuse_too(name):
    inputs = changed(CASCADE, *BAD_CASCADE[name][0])
    for op in (OPS.cascaded_group_attention, OPS.cascaded_group_attention_forward):
        with pytest.raises(RuntimeError):
            op(*inputs.values(), 0.5, 3, 3)


def test_gradients_of_other_shapes():
    inputs = BIASED.inputs().values()
    with pytest.raises(RuntimeError, match="grad_out must have shape"):
        OPS.biased_attention_backward(torch.ones(2, 3, 5, 4), *inputs, 0.5)
    with pytest.raises(RuntimeError, match="grad_out must have shape"):
        OPS.cascaded_group_attention_backward(torch.ones(2, 4, 5, 6), *CASCADE.inputs().values(), 0.5, 3, 3)


SIZES = st.integers(0, 4)


@settings(deadline=None)
@given(st.lists(st.lists(SIZES, min_size=1, max_size=4), min_size=8, max_size=8), st.integers(-1, 4))
def test_operators_survive_any_shapes(shapes, window):
    """They compute or raise; nothing crashes the process."""
    q, k, v, bias, *mixing = (torch.ones(shape) for shape in shapes)
    for talking_heads in ([], mixing):
        with contextlib.suppress(RuntimeError):
            OPS.biased_attention(q, k, v, bias, talking_heads, 0.5)
    with contextlib.suppress(RuntimeError):
        OPS.cascaded_group_attention(q, [k], [mixing[0]], [v], [mixing[1]], bias, 0.5, window, 2)
