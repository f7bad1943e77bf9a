"""How far modules under autocast are from float64, accelerated and stock: over many seeds, since one says nothing."""

from __future__ import annotations

import copy
import math
from statistics import fmean, stdev

import pytest
import torch
from same import assert_same
from torch import nn

import effattn
from effattn.nn import lite_mla, projection
from effattn.nn.projection import folded_convolution
from effattn.testing import import_timm, randomise_batch_norm, randomise_what_starts_at_zero
from effattn.tolerance import error

import_timm()
from timm.models import (  # noqa: E402  (loadable only now)
    efficientformer,
    efficientformer_v2,
    efficientvit_mit,
    efficientvit_msra,
)

SEEDS = 24
#: timm's modules, and the inputs that they get in its models: where a residual branch has a float32 scale, float32.
MODULES = {
    "LiteMLA": (
        lambda: efficientvit_mit.LiteMLA(64, 64, dim=16, norm_layer=(None, nn.BatchNorm2d)),
        (1, 64, 7, 7),
        torch.bfloat16,
    ),
    "cascade in windows": (
        lambda: efficientvit_msra.LocalWindowAttention(64, 16, 4, 1, resolution=8, window_resolution=4),
        (1, 64, 8, 8),
        torch.bfloat16,
    ),
    "cascade of wide heads": (
        lambda: efficientvit_msra.LocalWindowAttention(96, 8, 3, 4, resolution=7, window_resolution=7),
        (1, 96, 7, 7),
        torch.bfloat16,
    ),
    "EfficientFormer": (lambda: efficientformer.Attention(96, 16, 4, 4, resolution=7), (1, 49, 96), torch.float32),
    "V2": (lambda: efficientformer_v2.Attention2d(64, 16, 4, 4, resolution=7), (1, 64, 7, 7), torch.float32),
    "V2, stride": (
        lambda: efficientformer_v2.Attention2d(64, 16, 4, 4, resolution=10, stride=2),
        (1, 64, 10, 10),
        torch.float32,
    ),
    "V2, downsampling": (
        lambda: efficientformer_v2.Attention2dDownsample(64, 16, 4, 4, resolution=9, out_dim=96),
        (1, 64, 9, 9),
        torch.float32,
    ),
}


def modules(name, seed):
    """Stock, accelerated, the same in float64, and an input."""
    make, shape, dtype = MODULES[name]
    torch.manual_seed(seed)
    stock = make()
    randomise_batch_norm(stock, seed)
    randomise_what_starts_at_zero(stock, seed)
    stock.train(False)  # timm's eval() fails: its train() returns nothing
    fast = copy.deepcopy(stock)
    assert effattn.accelerate(fast).replaced
    return stock, fast, copy.deepcopy(fast).double(), torch.randn(shape).to(dtype)


def assert_no_rounding_was_added(ratios, visible):
    """The geometric mean of errors over stock's is at most 1, or above by no more than noise explains.

    ``visible``: the ratio that so many seeds must be able to tell from noise.
    """
    logs = [math.log(ratio) for ratio in ratios]
    standard_error = stdev(logs) / len(logs) ** 0.5
    assert 2 * standard_error < math.log(visible), f"too few seeds: {standard_error:.3f}"
    assert fmean(logs) <= 2 * standard_error, f"{math.exp(fmean(logs)):.4f} +- {standard_error:.4f}"


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "part by part"])
@pytest.mark.parametrize("name", MODULES)
def test_inference(name, at_once, monkeypatch):
    if not at_once:
        monkeypatch.setattr(projection, "_NARROW_AT_ONCE", 0)
    ratios = []
    for seed in range(SEEDS):
        stock, fast, wide, x = modules(name, seed)
        with torch.no_grad():
            truth = wide(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                expected, out = stock(x), fast(x)
        assert out.dtype == expected.dtype
        ratios.append(error(out, truth) / error(expected, truth))
    assert_no_rounding_was_added(ratios, 1.1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients(name, training):
    """Of the output, the input and all parameters together; in training, of a batch that has statistics."""
    ratios = []
    for seed in range(SEEDS):
        stock, fast, wide, x = modules(name, seed)
        x = x.repeat(4, *(1,) * (x.dim() - 1)) + torch.randn(4, *x.shape[1:]).to(x.dtype) if training else x
        results, grad_out = [], None
        for module in (wide, stock, fast):
            module.train(training)
            leaf = x.to(torch.float64 if module is wide else x.dtype, copy=True).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=module is not wide):
                out = module(leaf)
            grad_out = torch.randn(out.shape).bfloat16() if grad_out is None else grad_out
            parameters = list(module.parameters())
            grads = torch.autograd.grad(out, [leaf, *parameters], grad_out.to(out.dtype))
            results.append([out.detach(), grads[0], torch.cat([g.flatten() for g in grads[1:]])])
        truth, expected, mine = results
        ratios.append([error(m, t) / error(s, t) for m, s, t in zip(mine, expected, truth, strict=True)])
    for column in zip(*ratios, strict=True):
        assert_no_rounding_was_added(column, 1.4)  # what the rounding that was found had cost


GEOMETRIES = {
    "1x1": nn.Conv2d(24, 16, 1),
    "depthwise": nn.Conv2d(24, 24, 3, padding=1, groups=24),
    "halving": nn.Conv2d(24, 24, 3, 2, 1, groups=24),
    "dilated": nn.Conv2d(24, 24, 3, padding="same", dilation=2, groups=24),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("recorded", [True, False], ids=["with gradients", "inference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_folded_convolution(name, dtype, recorded, memory_format):
    """The bias, next to which the convolution is little, is added in float32: rounded before, it moves every pixel."""
    torch.manual_seed(0)
    conv = GEOMETRIES[name]
    x = torch.randn(2, 24, 9, 9).to(dtype=dtype, memory_format=memory_format)
    weight, bias = conv.weight.detach() / 16, 1 + torch.rand(len(conv.weight))
    wide = nn.functional.conv2d(
        x.double(), weight.to(dtype).double(), bias.double(), conv.stride, conv.padding, conv.dilation, conv.groups
    )
    with torch.set_grad_enabled(recorded), torch.autocast("cpu", dtype):
        out = folded_convolution(x.float(), weight, bias, None if name == "1x1" else conv)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    # Half a step of the result, and half a step of the convolution alone where it is rounded first.
    steps = torch.finfo(dtype).eps / 2 * (wide.abs() + (wide - bias.double()[:, None, None]).abs())
    assert ((out.double() - wide).abs() <= steps * (1 + 1e-3)).all()


def test_folded_convolution_is_differentiable():
    torch.manual_seed(0)
    arguments = [torch.randn(size) for size in ((2, 24, 5, 5), (16, 24), (16,))]
    grads = []
    for autocast in (False, True):
        leaves = [t.clone().requires_grad_() for t in arguments]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = folded_convolution(*leaves)
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for wide, narrow in zip(*grads, strict=True):
        assert narrow.dtype == torch.float32
        assert (narrow - wide).norm() <= 4 * torch.finfo(torch.bfloat16).eps * wide.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_folded_convolution_in_transforms(dtype):
    torch.manual_seed(0)
    x, weights, bias = torch.ones(1, 8, 3, 3), torch.randn(4, 5, 8), torch.ones(5)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        together = torch.func.vmap(lambda weight: folded_convolution(x, weight, bias))(weights)
        one_by_one = torch.stack([folded_convolution(x, weight, bias) for weight in weights])
        _, tangent = torch.func.jvp(lambda bias: folded_convolution(x, weights[0], bias), (bias,), (bias,))
    assert_same(together, one_by_one)
    assert (tangent == 1).all()


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "inference"])
@pytest.mark.parametrize("name", ["LiteMLA", "cascade in windows", "V2, stride"])
def test_compiled_without_a_break(name, grad, monkeypatch):
    """As near as two roundings of the same numbers: a graph may round a convolution before its bias is added."""
    monkeypatch.setattr(projection, "_NARROW_AT_ONCE", 0)
    _, fast, _, x = modules(name, 0)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        expected, out = fast(x), compiled(x)
    assert out.dtype == expected.dtype
    assert (out - expected).norm() <= 2 * torch.finfo(out.dtype).eps * expected.norm()


def test_what_is_done_at_once(monkeypatch):
    """Small batches: for large ones narrow products, called one by one, are faster."""
    _, fast, _, x = modules("LiteMLA", 0)
    at_once, seen = lite_mla.LiteMLA._at_once, []
    monkeypatch.setattr(
        lite_mla.LiteMLA, "_at_once", lambda self, x, folds: seen.append(x.dtype) or at_once(self, x, folds)
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast(x.float())
        assert seen == [torch.bfloat16]
        fast(x.repeat(projection._NARROW_AT_ONCE // (x.numel() * x.shape[1]) + 1, 1, 1, 1))
    assert len(seen) == 1
