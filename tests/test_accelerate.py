"""accelerate and restore: the same answers, the same state, whatever is done to the model in between."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from same import assert_as_near, assert_same
from specified import longest_sum
from tiers import full
from torch import nn

import effattn
from effattn import use_backend
from effattn.testing import import_timm, randomise_batch_norm
from effattn.tolerance import Results, bounds, check

timm = import_timm()


class ConvLayer(nn.Module):
    """The official repository's: what is not there is None."""

    def __init__(self, in_channels: int, out_channels: int, norm: bool) -> None:
        super().__init__()
        self.dropout, self.act = None, None
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class LiteMLA(nn.Module):
    """A module of the official repository's structure: names of parts, channel-major math, eps 1e-15."""

    def __init__(self, channels: int = 32, dim: int = 8, scales: tuple[int, ...] = (5,), kernel_func=None) -> None:
        super().__init__()
        heads = channels // dim
        total = heads * dim
        self.dim, self.eps = dim, 1e-15
        self.qkv = ConvLayer(channels, 3 * total, norm=False)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * total, 3 * total, k, padding=k // 2, groups=3 * total, bias=False),
                nn.Conv2d(3 * total, 3 * total, 1, groups=3 * heads, bias=False),
            )
            for k in scales
        )
        self.kernel_func = kernel_func or nn.ReLU()
        self.proj = ConvLayer(total * (1 + len(scales)), channels, norm=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, *(op(qkv) for op in self.aggreg)], dim=1)
        batch, _, height, width = qkv.shape
        q, k, v = qkv.reshape(batch, -1, 3 * self.dim, height * width).chunk(3, dim=2)
        q, k = self.kernel_func(q), self.kernel_func(k)
        v = nn.functional.pad(v, (0, 0, 0, 1), value=1.0)
        out = (v @ k.mT) @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + self.eps)
        return self.proj(out.reshape(batch, -1, height, width))


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name == "official":
        model = nn.Sequential(nn.Conv2d(3, 32, 3, 2), LiteMLA(), LiteMLA(scales=(3, 5)), LiteMLA(scales=()))
        x = torch.randn(2, 3, 33, 29)
    else:
        model, x = timm.create_model(name, num_classes=10), torch.randn(2, 3, 64, 64)
    randomise_batch_norm(model)
    return model.eval(), x


MODELS = ["official", "efficientvit_b0", "efficientvit_b1", "efficientvit_l1"]
COUNTS = {"official": 3, "efficientvit_b0": 4, "efficientvit_b1": 7, "efficientvit_l1": 6}


@pytest.mark.parametrize("name", MODELS)
def test_same_answers_in_eval_and_back(name):
    model, x = make(name)
    with torch.no_grad():
        expected = model(x)
        report = effattn.accelerate(model)
        assert len(report.replaced) == COUNTS[name] and not report.left_alone
        assert_same(model(x), expected)
        assert effattn.restore(model) == COUNTS[name] + len(report.blocks)
        assert torch.equal(model(x), expected)
        assert effattn.restore(model) == 0


@pytest.mark.parametrize("name", ["official", "efficientvit_b0"])
def test_same_training_steps(name):
    """Of the stock model and the accelerated one, against the latter in float64: timm's casts to float32."""
    model, x = make(name)
    fast = copy.deepcopy(model)
    effattn.accelerate(fast)
    exact = copy.deepcopy(fast).double()
    with use_backend("reference"):
        truth, allowed, _ = bounds(lambda: trained(copy.deepcopy(exact), x.double()), longest_sum(model, x))
    for m in (model, fast):
        check(trained(m, x), truth, allowed)
    for theirs, mine in zip(model.buffers(), fast.buffers(), strict=True):
        assert_same(mine, theirs)


def trained(module: nn.Module, x: torch.Tensor) -> Results:
    """The gradients of two steps, so short that the second does not multiply the roundings of the first.

    A step hardly moves a weight, but the gradients after it: were it not taken, the second ones would tell.
    """
    module.train()
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-3)
    results = {}
    for step in range(2):
        optimiser.zero_grad()
        module(x).square().mean().backward()
        results |= {f"{name}, step {step}": p.grad.clone() for name, p in module.named_parameters()}
        optimiser.step()
    return results


def test_in_float64_the_answers_are_the_official_ones():
    """Through the reference: the same function to the last digits, the quadratic case included."""
    model, _ = make("official")
    model.double()
    for size in (33, 3):
        x = torch.randn(1, 3, size, size, dtype=torch.float64)
        expected = model(x)
        effattn.accelerate(model)
        assert_same(model(x), expected)
        effattn.restore(model)


@pytest.mark.parametrize("name", ["official", "efficientvit_b0"])
def test_autocast(name):
    model, x = make(name)
    with torch.no_grad():
        truth = model(x).double()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stock = model(x)
            effattn.accelerate(model)
            fast = model(x)
    assert fast.dtype == stock.dtype
    assert_as_near(fast, stock, truth)


@pytest.mark.parametrize("train", [full(False), True], ids=["eval", "train"])
def test_compile_fullgraph(train):
    model, x = make("efficientvit_b0")
    effattn.accelerate(model)
    model.train(train)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(train):
        expected, out = model(x), compiled(x)
    assert_same(out, expected)
    if train:
        out.sum().backward()


def test_state_dict_hooks_copies_and_pickles_survive():
    model, x = make("official")
    keys = list(model.state_dict())
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    effattn.accelerate(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(make("official")[0].state_dict())
    with torch.no_grad():
        expected = model(x)
        assert calls
        assert torch.equal(copy.deepcopy(model)(x), expected)
        loaded = make("official")[0]
        effattn.accelerate(loaded)
        assert torch.equal(loaded(x), expected)
    module = make("official")[0][1]
    effattn.accelerate(module)
    again = pickle.loads(pickle.dumps(module))
    y = torch.randn(1, 32, 6, 6)
    assert torch.equal(again(y), module(y))
    assert effattn.restore(again) == 1 and type(again) is LiteMLA


def test_the_report_tells_what_was_left_alone_and_why():
    class Stranger(nn.Module):
        pass

    Stranger.__name__ = "LiteMLA"
    strided, hooked, mixed = LiteMLA(), LiteMLA(), LiteMLA()
    strided.aggreg[0][0].stride = (2, 2)
    hooked.proj.conv.register_forward_hook(lambda *_: None)
    mixed.dim = 16
    patched = LiteMLA()
    patched.forward = lambda x, forward=patched.forward: 2 * forward(x)
    model = nn.ModuleDict(
        {
            "known": LiteMLA(),
            "other": LiteMLA(kernel_func=nn.GELU()),
            "stranger": Stranger(),
            "strided": strided,
            "hooked": hooked,
            "mixed": mixed,
            "ours": effattn.nn.LiteMLA(32, 32),
            "patched": patched,
            "derived": type("LiteMLA", (LiteMLA,), {})(),
            "leaky": LiteMLA(kernel_func=type("LeakyReLU", (nn.ReLU,), {})()),
        }
    )
    report = effattn.accelerate(model)
    assert [entry.module for entry in report.replaced] == ["known"]
    reasons = {entry.module: entry.detail for entry in report.left_alone}
    assert reasons == {
        "other": "kernel_func is GELU, not ReLU",
        "stranger": "it has no qkv, aggreg, proj, kernel_func, dim, eps",
        "strided": "aggreg.0.0 is not a depthwise convolution of an odd kernel that keeps the size",
        "hooked": "its parts have hooks or forwards of their own: proj.conv",
        "mixed": "aggreg.0.1 is not a 1x1 convolution in 6 groups",
        "ours": "effattn's own",
        "patched": "its forward was replaced on the instance",
        "derived": "its class derives from another of that name",
        "leaky": "kernel_func is LeakyReLU, not ReLU",
    }
    text = str(report)
    assert "1 replaced, 9 left alone" in text and "known" in text and "GELU" in text
    again = effattn.accelerate(model)
    assert not again.replaced and again.left_alone[0].detail == "accelerated already"


def test_the_model_itself_may_be_the_module():
    module = LiteMLA()
    assert effattn.accelerate(module).replaced[0].module == "(model)"


@pytest.mark.parametrize("function", [effattn.accelerate, effattn.restore])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        function({})


def test_a_model_of_nothing_known():
    assert (
        str(effattn.accelerate(nn.Sequential(nn.Linear(2, 2)))) == "effattn.accelerate: nothing in this model is known"
    )
