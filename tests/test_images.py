"""Operators on images take them however they lie: the same bits as for a contiguous one, and no memory but their own.

Also run under sanitizers.
"""

from __future__ import annotations

import pytest
import torch

import effattn
from effattn.ops import cascaded_group_attention_projected as cascade_op
from effattn.ops import projected_attention as attention_op
from effattn.ops.lite_mla import Weights, lite_mla
from effattn.testing import CascadeCase, MultiScaleCase, make_image, make_tensor

pytestmark = [pytest.mark.arguments, pytest.mark.pairwise]

CHANNELS, HEIGHT, WIDTH = 24, 7, 5
MULTI_SCALE = MultiScaleCase(2, 2, 4, HEIGHT, WIDTH, biases=True)
CASCADE = CascadeCase(2, CHANNELS, 4, HEIGHT, WIDTH, 4, (3, 5))
FORMATS = ("channels_last", "channel slice", "crop", "transposed", "equal rows", "equal columns")


def scales():
    inputs = MULTI_SCALE.inputs()
    return [inputs[name] for name in ("dw_weights", "pw_weights", "dw_biases", "pw_biases")]


def call_lite_mla(x):
    projections = make_tensor(CHANNELS, CHANNELS, seed=3), None, *scales(), make_tensor(9, 16, seed=4), None
    return lite_mla(x, Weights(*projections), 4, 1e-15)


def cascade_weights():
    return list(CASCADE.inputs().values())[1:]


def call_projected_cascade(x):
    weights = cascade_op.Weights(*cascade_weights(), make_tensor(9, CHANNELS, seed=5), make_tensor(1, 9, seed=6)[0])
    return cascade_op.projected(x, cascade_op.pack(weights), 0.5, 4, 4)


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
    "aggregation": lambda x: effattn.multi_scale_aggregation(x, *scales(), head_dim=4),
    "multi-scale": lambda x: effattn.multi_scale_linear_attention(x, *scales(), head_dim=4),
    "lite_mla": call_lite_mla,
    "cascade": lambda x: effattn.cascaded_group_attention(x, *cascade_weights(), window_size=4),
    "projected cascade": call_projected_cascade,
    "projected attention": call_projected_attention,
    "halved attention": lambda x: call_halved_attention(x, False),
    "halved queries": lambda x: call_halved_attention(x, True),
}
DIFFERENTIABLE = ("aggregation", "multi-scale", "cascade")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_any_strides(isa, name, memory_format, dtype):
    x = make_image(2, CHANNELS, HEIGHT, WIDTH, memory_format).to(dtype)
    assert dtype != torch.float32 or x.stride() == make_image(2, CHANNELS, HEIGHT, WIDTH, memory_format).stride()
    with torch.no_grad():
        expected, out = CALLS[name](x.contiguous()), CALLS[name](x)
        torch.testing.assert_close(out, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4)
    if name in DIFFERENTIABLE:
        grads = []
        for image in (x.contiguous(), x):
            leaf = image.detach().requires_grad_()
            grad_out = make_image(*expected.shape, memory_format).to(dtype)
            grads += torch.autograd.grad(CALLS[name](leaf), leaf, grad_out)
        torch.testing.assert_close(*reversed(grads), rtol=1e-5 if dtype == torch.float32 else 1e-1, atol=1e-3)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_say_the_same_strides(name, memory_format):
    x = make_image(2, CHANNELS, HEIGHT, WIDTH, memory_format)
    with torch.no_grad():
        real = CALLS[name](x)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = CALLS[name](mode.from_tensor(x))
    assert fake.shape == real.shape and fake.stride() == real.stride()
