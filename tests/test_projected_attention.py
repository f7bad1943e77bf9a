"""The operator behind the inference of EfficientFormer's attention, whose weights are packed.

Against float64, on every instruction set; bad arguments. Also run under sanitizers and, cross-compiled, under
emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from same import assert_same
from torch.nn import functional

from effattn import use_backend
from effattn.ops import _packed as packed
from effattn.ops import projected_attention as attention_op
from effattn.testing import make_image, make_tensor
from effattn.tolerance import ROUNDING, check_against

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise]

OPS = torch.ops.effattn
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUT = 37  # no multiple of what a block takes


@dataclass(frozen=True)
class AttentionCase:
    """Sizes of EfficientFormer's attentions; ``halved``: "queries", or "all" of the image."""

    batch: int
    channels: int
    heads: int
    key_dim: int
    value_dim: int
    height: int
    width: int
    kernel: int = 0
    talking: bool = False
    activation: str = "none"
    halved: str = ""
    out_size: tuple[int, int] | None = None

    @property
    def queries(self) -> tuple[int, int]:
        return (-(-self.height // 2), -(-self.width // 2)) if self.halved else (self.height, self.width)

    @property
    def keys(self) -> int:
        return math.prod(self.queries) if self.halved == "all" else self.height * self.width

    def weights(self) -> dict:
        """Of a size that keeps activations where they are."""

        def convolution(outputs, inputs, seed):
            return make_tensor(outputs, inputs, seed=seed) / inputs**0.5, make_tensor(1, outputs, seed=seed + 1)[0] / 4

        h, k = self.heads, self.kernel
        mixing = [make_tensor(h, h, seed=5) / h**0.5, make_tensor(1, h, seed=6)[0]]
        mixing += [make_tensor(h, h, seed=7) / h**0.5, make_tensor(1, h, seed=8)[0] / 9]
        local = make_tensor(h * self.value_dim, 1, k, k, seed=9) / k if k else None
        return {
            "q": convolution(h * self.key_dim, self.channels, 10),
            "k": convolution(h * self.key_dim, self.channels, 20),
            "v": convolution(h * self.value_dim, self.channels, 30),
            "bias": make_tensor(h, math.prod(self.queries), self.keys, seed=40),
            "proj": convolution(OUT, h * self.value_dim, 50),
            "talking_heads": mixing if self.talking else (),
            "local": None if local is None else (local, make_tensor(1, h * self.value_dim, seed=41)[0]),
            "halving": (make_tensor(self.channels, 1, 3, 3, seed=42) / 3, make_tensor(1, self.channels, seed=43)[0])
            if self.halved
            else None,
        }

    def x(self, dtype=torch.float32, memory_format="nchw"):
        return make_image(self.batch, self.channels, self.height, self.width, memory_format).to(dtype)

    def packed(self):
        return attention_op.pack(**self.weights(), halves_queries_alone=self.halved == "queries")

    def call(self, x):
        weights = self.packed()
        if x.dtype == torch.float64:  # the reference alone takes it
            weights = attention_op.Packed(*(in_float64(value) for value in weights))
        return attention_op.projected_attention(x, weights, 0.3, activation=self.activation, out_size=self.out_size)


def in_float64(value):
    if isinstance(value, list):
        return [in_float64(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


ATTENTION = {
    "efficientformer": AttentionCase(2, 24, 3, 5, 10, 12, 1),
    "whole vectors": AttentionCase(1, 64, 2, 16, 32, 7, 7),
    "v2": AttentionCase(2, 24, 4, 5, 10, 7, 7, 3, True, "gelu"),
    "v2, upsampled": AttentionCase(2, 24, 3, 8, 16, 4, 3, 3, True, "gelu", out_size=(7, 6)),
    "v2, halved": AttentionCase(2, 24, 4, 5, 10, 7, 6, 3, False, "relu", "queries"),
    "v2, all halved": AttentionCase(2, 40, 4, 5, 10, 7, 6, 3, True, "gelu", "all", out_size=(7, 6)),
    "5x5, halved, one row": AttentionCase(1, 20, 2, 16, 16, 1, 9, 5, False, "gelu", "queries"),
    "no kernel, all halved": AttentionCase(2, 33, 2, 8, 16, 1, 1, 0, False, "none", "all"),
    "one token": AttentionCase(2, 8, 2, 4, 4, 1, 1, 3, True, "none"),
    "many queries": AttentionCase(1, 16, 2, 4, 20, 13, 12, 0, True, "relu"),
    "upsampled, no kernel": AttentionCase(1, 16, 2, 4, 20, 3, 3, 0, False, "relu", out_size=(5, 9)),
}


def check(case, x):
    """Against float64, which the plain formulation alone takes."""
    longest_sum = max(case.channels, case.keys, case.heads * max(case.key_dim, case.value_dim))
    out = case.call(x)
    assert out.dtype == x.dtype
    check_against(lambda: {"out": case.call(x.double())}, {"out": out}, longest_sum)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", ["nchw", "channels_last", "crop"])
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.remainders
def test_attention_against_float64(isa, name, memory_format, dtype):
    case = ATTENTION[name]
    out = check(case, case.x(dtype, memory_format))
    assert out.shape == (case.batch, OUT, *(case.out_size or case.queries))


def test_the_reference_is_what_it_says():
    """From the weights as they came, in float64: the truth of all the others."""
    for name in ("v2, halved", "v2, upsampled", "v2, all halved"):
        case = ATTENTION[name]
        x = case.x().double()
        w = {key: in_float64(list(t) if isinstance(t, tuple) else t) for key, t in case.weights().items()}
        with use_backend("reference"):
            out = case.call(x)

        def conv(image, part, **options):
            weight, bias = part
            return functional.conv2d(image, weight if weight.dim() == 4 else weight[..., None, None], bias, **options)

        q_image = conv(x, w["halving"], padding=1, stride=2, groups=x.shape[1]) if case.halved else x
        image = q_image if case.halved == "all" else x
        q, k, v = conv(q_image, w["q"]), conv(image, w["k"]), conv(image, w["v"])
        q, k, heads = (t.flatten(2).unflatten(1, (case.heads, -1)) for t in (q, k, v))
        logits = 0.3 * q.mT @ k + w["bias"].double()
        if case.talking:
            logits = torch.einsum("gh,bhnm->bgnm", w["talking_heads"][0], logits)
            logits = logits + w["talking_heads"][1][:, None, None]
        p = logits.softmax(-1)
        if case.talking:
            p = torch.einsum("gh,bhnm->bgnm", w["talking_heads"][2], p) + w["talking_heads"][3][:, None, None]
        expected = (heads @ p.mT).reshape(case.batch, -1, *case.queries)
        local = conv(v, w["local"], padding=1, stride=2 if case.halved == "queries" else 1, groups=v.shape[1])
        expected = expected + local
        if case.out_size:
            expected = functional.interpolate(expected, size=case.out_size, mode="bilinear")
        expected = conv(functional.gelu(expected) if case.activation == "gelu" else expected.relu(), w["proj"])
        assert_same(out, expected)


def test_same_bits_for_every_thread_count(isa, threads):
    for memory_format in ("nchw", "channels_last"):
        images = {name: case.x(memory_format=memory_format) for name, case in ATTENTION.items()}
        expected = {}
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            outs = {name: ATTENTION[name].call(image) for name, image in images.items()}
            expected = expected or outs
            assert all(torch.equal(outs[name], out) for name, out in expected.items())


@pytest.mark.parametrize("size", [(0, 7, 7), (2, 0, 7), (2, 7, 0)], ids=str)
def test_empty(isa, size):
    batch, height, width = size
    case = replace(ATTENTION["v2"], batch=batch, height=height, width=width)
    assert case.call(case.x()).shape == (batch, OUT, height, width)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_image(isa, value):
    case = ATTENTION["v2"]
    x = case.x()
    x[0, 3, 2, 2] = value
    with use_backend("reference"):
        expected = case.call(x)
    out = case.call(x)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert not out[0].isfinite().any() and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["efficientformer", "v2", "v2, halved"])
def test_logits_of_1e4(isa, name, dtype):
    """Of images that are so large: only differences to the largest logit may be taken."""
    case = ATTENTION[name]
    x = case.x(dtype) * 500
    q, k = (functional.conv2d(x.double(), case.weights()[part][0].double()[..., None, None]) for part in "qk")
    q, k = (t.flatten(2).unflatten(1, (case.heads, -1)) for t in (q, k))
    logits = 0.3 * q.mT @ k
    assert logits.max() > 1e4 and logits.min() < -1e4
    assert check(case, x).isfinite().all()


def test_equal_logits_are_an_average(isa):
    """Queries of zeros and biases of 1e4: the mean of the values, through the projection."""
    case = ATTENTION["efficientformer"]
    weights = case.weights()
    weights["q"] = tuple(torch.zeros_like(t) for t in weights["q"])
    weights["bias"] = torch.full_like(weights["bias"], 1e4)
    x = case.x()
    out = attention_op.projected_attention(x, attention_op.pack(**weights), 0.3)
    (v, v_bias), (proj, proj_bias) = ([t.double() for t in weights[name]] for name in ("v", "proj"))
    mean = x.double().mean(dim=(2, 3)) @ v.mT + v_bias
    expected = (mean @ proj.mT + proj_bias)[:, :, None, None].expand_as(out)
    assert_same(out, expected.float())


@pytest.mark.remainders
def test_gelu_everywhere(isa):
    """Through an attention that passes its only token on: near zero, far out, and where nothing is left."""
    values = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-20, -1e-20, 1e4, -1e4])])
    one = torch.ones(1, 1), torch.zeros(1)
    weights = attention_op.pack(one, one, one, torch.zeros(1, 1, 1), one)
    out = attention_op.projected_attention(values.reshape(-1, 1, 1, 1), weights, 1.0, activation="gelu").flatten()
    truth = functional.gelu(values.double())
    # Of half an erfc, which is at most 1: the error of its approximation (kernels/cpu/core/simd.h) and six roundings,
    # of what its series is of, of the series, of the exponential, of two products and of a difference.
    allowed = (1.5e-7 + 6 * ROUNDING) / 2 * values.abs()
    assert ((out - truth).abs() <= allowed).all()
    assert out[-1] == 0 and out[-2] == 1e4


@pytest.mark.registration
def test_opcheck():
    for name in ("v2", "v2, upsampled", "v2, halved", "v2, all halved", "efficientformer"):
        case = ATTENTION[name]
        size = case.out_size or case.queries
        number = attention_op.ACTIVATIONS[case.activation]
        torch.library.opcheck(OPS.projected_attention.default, (case.x(), *case.packed(), 0.3, number, *size))


def test_packing_is_undone():
    weight = torch.randn(3 * 5, 7)
    whole = packed.of_whole_heads(weight, 3)
    assert whole.shape == (48, 7) and torch.equal(packed.of_heads(whole, 3, 5), weight)
    assert torch.equal(packed.unpack_projection(packed.pack_projection(weight), 15), weight)
    assert packed.pack_projection(weight).shape == (1, 7, 32)


# --- wrong arguments -------------------------------------------------------------------------------------------


WRONG_ATTENTION = {
    "x rank": ("x", torch.ones(2, 24, 7), "x: expected 4 dimensions"),
    "x integers": ("x", torch.ones(2, 24, 7, 7).long(), "x: expected float32, bfloat16 or float16"),
    "x channels": ("x", torch.ones(2, 25, 7, 7), "qkv: expected shape"),
    "x size": ("x", torch.ones(2, 24, 7, 6), "bias: expected shape"),
    "q alone": ("q", torch.ones(2, 24, 32), "q, q_bias: expected both"),
    "qkv": ("qkv", torch.ones(5, 24, 16), "qkv: expected shape"),
    "qkv_bias": ("qkv_bias", torch.ones(3), "qkv_bias: expected shape"),
    "bias rank": ("bias", torch.ones(49, 49), r"bias: expected shape \(heads, queries, keys\)"),
    "bias dtype": ("bias", torch.ones(4, 49, 49).double(), "bias: expected float32"),
    "mixing": ("talking_heads", [torch.ones(4, 4)], "talking_heads: expected none or 4 tensors"),
    "taps": ("taps", torch.ones(2, 8, 32), "taps: expected shape"),
    "tap_bias": ("tap_bias", None, "taps, tap_bias: expected both"),
    "proj": ("proj", torch.ones(2, 60, 32), "proj: expected shape"),
    "proj_bias": ("proj_bias", torch.ones(2, 2), "proj_bias: expected 1 dimension"),
    "key_dim": ("key_dim", 0, "key_dim, value_dim: expected positive numbers"),
    "scale": ("scale", float("nan"), "scale: expected a finite float32"),
    "activation": ("activation", 3, r"activation: expected 0 \(none\), 1 \(relu\) or 2 \(gelu\), got 3"),
    "out_height": ("out_height", 6, "out_height, out_width: expected at least the queries', 7 x 7, got 6 x 7"),
}


@pytest.mark.parametrize("name", WRONG_ATTENTION)
def test_wrong_arguments_of_attention(name):
    case = ATTENTION["v2"]
    weights = attention_op.pack(**case.weights())._asdict()
    arguments = {"x": case.x(), **weights, "scale": 0.3, "activation": 2}
    arguments |= {"out_height": 7, "out_width": 7}
    key, value, message = WRONG_ATTENTION[name]
    arguments[key] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.projected_attention(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("halving_taps", torch.ones(1, 8, 32), "halving_taps: expected shape"),
        ("halving_taps", torch.ones(2, 9, 32), "halving_taps: expected shape"),
        ("halving_taps", None, "halving_taps, halving_bias: expected both"),
        ("halving_bias", torch.ones(31), "halving_bias: expected shape"),
        ("q", torch.ones(3, 24, 32), "q: expected shape"),
        ("bias", torch.ones(4, 49, 42), "bias: expected shape"),
    ],
)
def test_wrong_halving(name, value, message):
    case = ATTENTION["v2, halved"]
    arguments = {"x": case.x(), **case.packed()._asdict(), "scale": 0.3, "activation": 2, "height": 4, "width": 3}
    with pytest.raises(RuntimeError, match=message):
        OPS.projected_attention(*{**arguments, name: value}.values())


def test_queries_of_their_own_need_an_image():
    case = ATTENTION["v2, halved"]
    weights = case.packed()._replace(halving_taps=None, halving_bias=None)
    with pytest.raises(RuntimeError, match="q: expected None where no halving_taps"):
        OPS.projected_attention(case.x(), *weights, 0.3, 0, 7, 6)
