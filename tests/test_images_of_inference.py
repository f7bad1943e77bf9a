"""Operators of modules' inference take images however they lie (of all others, tests/conformance).

Also run under sanitizers.
"""

from __future__ import annotations

import pytest
import torch

from effattn.ops import INFERENCE_OPERATORS
from effattn.ops import projected_attention as attention_op
from effattn.testing import make_arguments, make_image, make_tensor
from effattn.tolerance import check_against

pytestmark = [pytest.mark.arguments, pytest.mark.pairwise]

CHANNELS, HEIGHT, WIDTH = 24, 7, 5
FORMATS = ("channels_last", "channel slice", "crop", "transposed", "equal rows", "equal columns")
LITE_MLA = {"B": 2, "C": CHANNELS, "H": HEIGHT, "W": WIDTH, "C_out": 9, "heads": 2, "head_dim": 4, "S": 1, "k": (5,)}


def call_lite_mla(x):
    operator = INFERENCE_OPERATORS["lite_mla"]
    return operator(x, *make_arguments(operator, LITE_MLA | {"eps": 1e-15})[1:])


def call_projected_attention(x):
    def convolution(outputs, inputs, seed):
        return make_tensor(outputs, inputs, seed=seed), make_tensor(1, outputs, seed=seed + 1)[0]

    q, k, v, proj = (
        convolution(*sizes) for sizes in ((8, CHANNELS, 10), (8, CHANNELS, 20), (12, CHANNELS, 30), (9, 12, 40))
    )
    weights = attention_op.pack(q, k, v, make_tensor(2, HEIGHT * WIDTH, HEIGHT * WIDTH, seed=50), proj)
    return attention_op.projected_attention(x, weights, 0.5)


def call_halved_attention(x, queries_alone):
    def convolution(outputs, inputs, seed):
        return make_tensor(outputs, inputs, seed=seed), make_tensor(1, outputs, seed=seed + 1)[0]

    queries = -(-HEIGHT // 2) * -(-WIDTH // 2)
    keys = HEIGHT * WIDTH if queries_alone else queries
    parts = [convolution(*sizes) for sizes in ((8, CHANNELS, 10), (8, CHANNELS, 20), (12, CHANNELS, 30), (9, 12, 40))]
    depthwise = [(make_tensor(c, 1, 3, 3, seed=60), make_tensor(1, c, seed=61)[0]) for c in (12, CHANNELS)]
    weights = attention_op.pack(
        *parts[:3],
        make_tensor(2, queries, keys, seed=50),
        parts[3],
        local=depthwise[0],
        halving=depthwise[1],
        halves_queries_alone=queries_alone,
    )
    out_size = None if queries_alone else (HEIGHT, WIDTH)
    return attention_op.projected_attention(x, weights, 0.1, activation="gelu", out_size=out_size)


CALLS = {
    "lite_mla": call_lite_mla,
    "projected attention": call_projected_attention,
    "halved attention": lambda x: call_halved_attention(x, False),
    "halved queries": lambda x: call_halved_attention(x, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_any_strides(isa, name, memory_format, dtype):
    x = make_image(2, CHANNELS, HEIGHT, WIDTH, memory_format).to(dtype)
    assert dtype != torch.float32 or x.stride() == make_image(2, CHANNELS, HEIGHT, WIDTH, memory_format).stride()
    out = CALLS[name](x)
    assert out.dtype == dtype
    check_against(lambda: {"out": CALLS[name](x.double())}, {"out": out}, HEIGHT * WIDTH)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_say_the_same_strides(name, memory_format):
    x = make_image(2, CHANNELS, HEIGHT, WIDTH, memory_format)
    with torch.no_grad():
        real = CALLS[name](x)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = CALLS[name](mode.from_tensor(x))
    assert fake.shape == real.shape and fake.stride() == real.stride()


def test_more_elements_than_can_be_counted():
    """A fake tensor has no memory that would run out first."""
    x, bias = torch.empty(0, 2, 2, 2, device="meta"), torch.empty(4, device="meta")
    weights = [None] * 4 + [bias] * 3 + [[], None, None, bias, bias]
    with pytest.raises(RuntimeError, match="elements can be counted, not one of shape"):
        torch.ops.effattn.projected_attention(x, *weights, 1, 1, 1.0, 0, 2**40, 2**40)


def test_taps_of_more_than_can_be_counted():
    """A square whose side would be looked for until an int64 overflows."""
    taps, weights = torch.empty(0, 1, 1).expand(0, 2**63 - 1, 1), torch.empty(4)
    arguments = [taps, weights, None, None, weights, weights, torch.empty(1, 1, 1), [], None, None, weights, weights]
    with pytest.raises(RuntimeError, match=r"halving_taps: expected shape \(blocks, k \* k, 32\) with an odd k"):
        torch.ops.effattn.projected_attention(torch.empty(1, 2, 2, 2), *arguments, 1, 1, 1.0, 0, 2, 2)
