"""Wrong arguments of multi_scale_*: a named error from the function, a RuntimeError from the operator, no crash."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn import multi_scale_aggregation, multi_scale_linear_attention, use_backend
from effattn.testing import MultiScaleCase

pytestmark = pytest.mark.arguments

OPS = torch.ops.effattn
CASE = MultiScaleCase(2, 2, 4, 5, 6, kernels=(3, 5), biases=True)
C = CASE.channels


def changed(name, value, at=None):
    inputs = CASE.inputs()
    if at is None:
        inputs[name] = value
    else:
        inputs[name][at] = value
    return inputs


QKV = CASE.inputs()["qkv"]
DW, PW, BIAS = torch.randn(C, 1, 3, 3), torch.randn(C, 4, 1, 1), torch.randn(C)
BAD = {
    "qkv list": (changed("qkv", [1.0]), {}, TypeError, "qkv: expected a torch.Tensor, got list"),
    "qkv rank": (changed("qkv", QKV[0]), {}, ValueError, r"qkv: expected 4 dimensions .* got shape \(24, 5, 6\)"),
    "qkv integer": (changed("qkv", QKV.long()), {}, TypeError, "qkv: expected float16, .*, got torch.int64"),
    "qkv sparse": (changed("qkv", QKV.to_sparse()), {}, TypeError, "qkv: expected a dense .* torch.sparse_coo"),
    "qkv channels": (
        changed("qkv", QKV[:, :23]),
        {},
        ValueError,
        r"qkv: expected a multiple of 3 \* head_dim = 12 channels, got shape \(2, 23, 5, 6\)",
    ),
    "head_dim": (CASE.inputs(), {"head_dim": 5}, ValueError, r"qkv: expected a multiple of 3 \* head_dim = 15"),
    "head_dim zero": (CASE.inputs(), {"head_dim": 0}, ValueError, "head_dim: expected a positive number, got 0"),
    "head_dim float": (CASE.inputs(), {"head_dim": 4.0}, TypeError, "head_dim: expected an int, got float"),
    "one tensor": (changed("dw_weights", DW), {}, TypeError, "dw_weights: expected a sequence of tensors, got Tensor"),
    "too few": (changed("pw_weights", [PW]), {}, ValueError, "pw_weights: expected a tensor a scale .* 2, got 1"),
    "biases too many": (changed("dw_biases", [BIAS] * 3), {}, ValueError, "dw_biases: .* 2, got 3"),
    "not a tensor": (
        changed("pw_weights", None, 1),
        {},
        TypeError,
        r"pw_weights\[1\]: expected a torch.Tensor, got None",
    ),
    "even kernel": (
        changed("dw_weights", torch.randn(C, 1, 4, 4), 1),
        {},
        ValueError,
        r"dw_weights\[1\]: expected an odd kernel size, got shape \(24, 1, 4, 4\)",
    ),
    "oblong kernel": (
        changed("dw_weights", torch.randn(C, 1, 5, 3), 0),
        {},
        ValueError,
        r"dw_weights\[0\]: expected shape \(24, 1, 3, 3\), got \(24, 1, 5, 3\)",
    ),
    "dw channels": (
        changed("dw_weights", DW[:12], 0),
        {},
        ValueError,
        r"dw_weights\[0\]: expected shape \(24, 1, 3, 3\)",
    ),
    "dw rank": (changed("dw_weights", DW[:, 0], 0), {}, ValueError, r"dw_weights\[0\]: expected at least 4 dimensions"),
    "pw shape": (changed("pw_weights", DW, 0), {}, ValueError, r"pw_weights\[0\]: expected shape \(24, 4, 1, 1\)"),
    "bias shape": (
        changed("pw_biases", BIAS[:3], 1),
        {},
        ValueError,
        r"pw_biases\[1\]: expected shape \(24,\), got \(3,\)",
    ),
    "weight dtype": (
        changed("dw_weights", DW.half(), 0),
        {},
        TypeError,
        r"dw_weights\[0\]: expected the dtype of qkv, torch.float32, or float32, got torch.float16",
    ),
    "weight device": (
        changed("pw_weights", PW.to("meta"), 0),
        {},
        ValueError,
        r"pw_weights\[0\]: expected the device of qkv, cpu, got meta",
    ),
    "integer weight": (changed("dw_weights", DW.long(), 0), {}, TypeError, r"dw_weights\[0\]: expected float16, "),
}
BAD_EPS = {
    "negative": (-1.0, ValueError, "eps: expected a finite number >= 0, got -1.0"),
    "nan": (float("nan"), ValueError, "eps: expected a finite number >= 0, got nan"),
    "text": ("small", TypeError, "eps: expected a number, got str"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("function", [multi_scale_aggregation, multi_scale_linear_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BAD)
def test_the_function_names_the_argument(name, function, backend):
    inputs, options, error, message = BAD[name]
    with use_backend(backend), pytest.raises(error, match=message):
        function(*inputs.values(), **{"head_dim": CASE.head_dim, **options})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", BAD_EPS)
def test_eps(name, backend):
    eps, error, message = BAD_EPS[name]
    with use_backend(backend), pytest.raises(error, match=message):
        multi_scale_linear_attention(*CASE.inputs().values(), head_dim=CASE.head_dim, eps=eps)


@pytest.mark.parametrize("name", BAD)
def test_the_operators_raise_too(name):
    inputs, options, _, _ = BAD[name]
    head_dim = options.get("head_dim", CASE.head_dim)
    for op, rest in ((OPS.multi_scale_aggregation, ()), (OPS.multi_scale_linear_attention_forward, (1e-15,))):
        with pytest.raises(RuntimeError):
            op(*inputs.values(), head_dim, *rest)


@pytest.mark.parametrize("function", [multi_scale_aggregation, multi_scale_linear_attention], ids=lambda f: f.__name__)
def test_the_meta_device_gives_shapes(function):
    inputs = {
        k: v.to("meta") if isinstance(v, torch.Tensor) else [w.to("meta") for w in v] for k, v in CASE.inputs().items()
    }
    expected = CASE.call(function, CASE.inputs())
    assert CASE.call(function, inputs).shape == expected.shape


def test_more_scales_than_the_kernels_take():
    case = MultiScaleCase(1, 1, 4, 5, 6, kernels=(3,) * 9)
    inputs = case.inputs()
    with use_backend("reference"):
        expected = case.call(multi_scale_aggregation, inputs)
    assert torch.equal(case.call(multi_scale_aggregation, inputs), expected)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: takes up to 8 scales, not 9"):
        case.call(multi_scale_aggregation, inputs)
    with pytest.raises(RuntimeError, match="at most 8 scales are supported, got 9"):
        torch.ops.effattn.multi_scale_aggregation(*inputs.values(), case.head_dim)


@pytest.mark.parametrize(
    ("argument", "wrong", "message"),
    [
        (0, torch.randn(2, 24, 5, 5), r"grad_out must have shape \(2, 24, 5, 6\), got \(2, 24, 5, 5\)"),
        (0, torch.randn(2, 24, 5, 6).half(), "grad_out must have the dtype of qkv"),
        (6, torch.randn(2, 6, 5, 3), r"sums must have shape \(2, 6, 5, 4\), got"),
        (6, torch.randn(2, 6, 5, 4).half(), "sums must be float32"),
        (6, torch.randn(2, 6, 4, 5).mT, "sums must be contiguous"),
    ],
)
def test_the_backward_operator_checks_its_own(argument, wrong, message):
    inputs = list(CASE.inputs().values())
    out, sums = OPS.multi_scale_linear_attention_forward(*inputs, CASE.head_dim, 1e-15)
    arguments = [out, *inputs, sums]
    arguments[argument] = wrong
    with pytest.raises(RuntimeError, match=message):
        OPS.multi_scale_linear_attention_backward(*arguments, CASE.head_dim, 1e-15)


sizes = st.lists(st.integers(0, 4), min_size=0, max_size=5)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
some_tensor = st.builds(lambda size, dtype: torch.ones(size).to(dtype), sizes, dtypes)


@st.composite
def almost_fitting(draw):
    """Arguments that fit, but for one of them now and then."""
    case = MultiScaleCase(
        *(draw(st.integers(0, 3)) for _ in range(2)),
        *(draw(st.integers(1, 5)) for _ in range(1)),
        *(draw(st.integers(0, 9)) for _ in range(2)),
        kernels=tuple(draw(st.lists(st.sampled_from([1, 3, 5, 7]), max_size=2))),
        biases=draw(st.booleans()),
    )
    inputs = case.inputs(draw(dtypes.filter(lambda d: d != torch.int32)))
    name = draw(st.sampled_from([None, None, *inputs]))
    if name == "qkv":
        inputs[name] = draw(some_tensor)
    elif name is not None and inputs[name]:
        inputs[name][0] = draw(some_tensor)
    return case, inputs, draw(st.sampled_from([case.head_dim, case.head_dim, 0, -1, 7]))


@settings(deadline=None)
@given(almost_fitting())
def test_fuzz_the_functions(arguments):
    _, inputs, head_dim = arguments
    for function in (multi_scale_aggregation, multi_scale_linear_attention):
        try:
            out = function(*inputs.values(), head_dim=head_dim)
        except (ValueError, TypeError) as error:
            assert str(error).split(":")[0].split("[")[0] in (*inputs, "head_dim")
        else:
            qkv = inputs["qkv"]
            assert (out.shape[0], *out.shape[2:]) == (qkv.shape[0], *qkv.shape[2:])


@settings(deadline=None)
@given(almost_fitting())
def test_fuzz_the_operators(arguments):
    _, inputs, head_dim = arguments
    try:
        out, sums = OPS.multi_scale_linear_attention_forward(*inputs.values(), head_dim, 1e-5)
        grads = OPS.multi_scale_linear_attention_backward(out, *inputs.values(), sums, head_dim, 1e-5)
        aggregated = OPS.multi_scale_aggregation(*inputs.values(), head_dim)
        OPS.multi_scale_aggregation_backward(aggregated, *inputs.values(), head_dim)
    except RuntimeError:
        pass
    else:
        assert grads[0].shape == inputs["qkv"].shape
