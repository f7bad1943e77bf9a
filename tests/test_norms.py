"""Norms around the attention: synchronised, frozen, folded into the convolution, in evaluation and in training."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable, Hashable

import pytest
import torch
from same import assert_all_same, assert_same, is_same
from torch import nn
from torch.nn.utils import fusion

import effattn
from effattn.testing import import_timm, randomise_batch_norm, randomise_what_starts_at_zero

import_timm()
from timm.layers.norm_act import FrozenBatchNormAct2d, freeze_batch_norm_2d  # noqa: E402  (loadable only now)
from timm.models import efficientformer_v2, efficientvit_mit, efficientvit_msra  # noqa: E402
from timm.utils.model import reparameterize_model  # noqa: E402

V2 = {"dim": 24, "key_dim": 5, "num_heads": 4, "attn_ratio": 2}


def as_computed(name: str, t: torch.Tensor) -> torch.Tensor:
    """timm's linear attention casts to float32."""
    return t.float() if name == "lite mla" else t


MODULES = {
    "lite mla": (lambda: efficientvit_mit.LiteMLA(32, 32, norm_layer=(nn.BatchNorm2d, nn.BatchNorm2d)), (2, 32, 6, 7)),
    "cascade": (
        lambda: efficientvit_msra.LocalWindowAttention(48, 6, 3, 16 / 6, 10, 4, kernels=(7, 5, 3)),
        (2, 48, 10, 10),
    ),
    "v2": (lambda: efficientformer_v2.Attention2d(**V2, resolution=8, stride=2), (2, 24, 8, 8)),
    "v2, downsampling": (lambda: efficientformer_v2.Attention2dDownsample(**V2, resolution=7), (2, 24, 7, 7)),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = MODULES[name]
    model = nn.Sequential(build())  # changes of models exchange children
    randomise_batch_norm(model)
    randomise_what_starts_at_zero(model)
    model.eval()
    return model, torch.randn(shape)


def fused_by_torch(model: nn.Module) -> nn.Module:
    """The convolution has both, and an identity stands in the norm's place."""
    for part in model.modules():
        children = list(part.named_children())
        for (first, conv), (second, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(part, first, fusion.fuse_conv_bn_eval(conv, norm))
                setattr(part, second, nn.Identity())
    return model


def replaced_batch_norm(model: nn.Module) -> nn.Module:
    """Cream's: what can be fused is, every other BatchNorm goes."""
    for name, child in model.named_children():
        if hasattr(child, "fuse"):
            setattr(model, name, child.fuse())
        else:
            replaced_batch_norm(child)
    return model


class FrozenBatchNorm2d(nn.Module):
    """detectron2's: four buffers and a number of batches that counts nothing."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.num_features, self.eps = norm.num_features, norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


# Known by its name and by where it was defined.
FrozenBatchNorm2d.forward = types.FunctionType(
    FrozenBatchNorm2d.forward.__code__, {"__name__": "detectron2.layers.batch_norm"}, "forward"
)


def with_norms(exchange: Callable[[nn.BatchNorm2d], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        for part in list(model.modules()):
            for name, child in part.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(part, name, exchange(child))
        return model

    return change


def of_timm(norm: nn.BatchNorm2d) -> nn.Module:
    frozen = FrozenBatchNormAct2d(norm.num_features, norm.eps, apply_act=False)
    frozen.load_state_dict(norm.state_dict())
    return frozen


def without_affine(norm: nn.BatchNorm2d) -> nn.Module:
    plain = nn.BatchNorm2d(norm.num_features, affine=False).eval()
    plain.load_state_dict({k: v for k, v in norm.state_dict().items() if "running" in k or "tracked" in k})
    return plain


def without_statistics(norm: nn.BatchNorm2d) -> nn.Module:
    return nn.BatchNorm2d(norm.num_features, track_running_stats=False).eval()


CHANGES = {
    "synchronised": nn.SyncBatchNorm.convert_sync_batchnorm,
    "reparameterised by timm": reparameterize_model,
    "fused by Cream": replaced_batch_norm,
    "fused by torch": fused_by_torch,
    "frozen by timm": freeze_batch_norm_2d,
    "frozen, timm's with a place for an activation": with_norms(of_timm),
    "frozen, detectron2's": with_norms(FrozenBatchNorm2d),
    "without affine": with_norms(without_affine),
    "without statistics": with_norms(without_statistics),
}


def kept(model: nn.Module) -> dict[Hashable, object]:
    return {
        name: entry for part in model.modules() for name, entry in part.__dict__.get("_effattn_fold_cache", {}).items()
    }


@pytest.mark.parametrize("order", ["before", "after", "after a call"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODULES)
def test_inference_is_one_operator_still(name, change, order):
    model, x = make(name)
    expected = CHANGES[change](copy.deepcopy(model))
    expected.eval()
    if order == "before":
        model = CHANGES[change](model)
    assert not effattn.accelerate(model).left_alone
    with torch.no_grad():
        if order == "after a call":
            model(x)
        if order != "before":
            model = CHANGES[change](model)
        model.eval()
        assert_same(model(x), expected(x))
        whole = [entry for key, entry in kept(model).items() if str(key).startswith(("packed", "at once", "block"))]
        assert any(entry is not None for entry in whole) == (change != "without statistics")
        effattn.restore(model)
        assert_same(model(x), expected(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODULES)
def test_gradients_in_float64(name, change, training):
    """timm's LiteMLA goes through float32 in the middle."""
    model, x = make(name)
    model = CHANGES[change](model).double()
    model.train(training)
    fast = copy.deepcopy(model)
    assert not effattn.accelerate(fast).left_alone
    results = []
    for module in (model, fast):
        image = x.double().requires_grad_()
        out = module(image)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
        leaves = [p for p in module.parameters() if p.requires_grad]
        grads = torch.autograd.grad((out * weights).sum(), [image, *leaves], allow_unused=True)
        results.append([out, *grads, *module.buffers()])
    # timm gathers its biases without gradients in evaluation.
    given = [i for i, pair in enumerate(zip(*results, strict=True)) if all(t is not None for t in pair)]
    theirs, mine = ([as_computed(name, result[i]) for i in given] for result in results)
    assert_all_same(mine, theirs)


@pytest.mark.parametrize("name", MODULES)
def test_a_synchronised_norm_is_called_in_training(name, monkeypatch):
    """It takes the statistics of other processes too; in evaluation it is folded."""
    calls = []
    forward = nn.SyncBatchNorm.forward
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: calls.append(self) or forward(self, x))
    model, x = make(name)
    effattn.accelerate(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    with torch.no_grad():
        model(x)
    assert not calls
    model.train()
    model(x).sum().backward()
    assert {id(norm) for norm in calls} == {id(norm) for norm in norms}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("which", [slice(None), slice(None, None, 2)], ids=["all", "every other"])
def test_norms_frozen_by_their_mode(name, which):
    """requires_grad off and evaluation, while the rest trains: they keep their statistics."""
    model, x = make(name)
    fast = copy.deepcopy(model)
    effattn.accelerate(fast)
    results = []
    for module in (model, fast):
        module.double().train()
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms[which]:
            norm.eval().requires_grad_(False)
        statistics = [norm.running_mean.clone() for norm in norms[which]]
        out = module(x.double())
        leaves = [p for p in module.parameters() if p.requires_grad]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        assert all(map(torch.equal, statistics, (norm.running_mean for norm in norms[which])))
    theirs, mine = ([as_computed(name, t) for t in result] for result in results)
    assert_all_same(mine, theirs)


@pytest.mark.parametrize("name", ["cascade", "v2"])
def test_frozen_statistics_are_never_stale(name):
    model, x = make(name)
    model = with_norms(FrozenBatchNorm2d)(model)
    effattn.accelerate(model)
    norm = next(m for m in model.modules() if isinstance(m, FrozenBatchNorm2d))
    with torch.no_grad():
        before = model(x)
        norm.running_var.mul_(2.0)
        after = model(x)
        assert not is_same(before, after)
        norm.eps = 0.5
        last = model(x)
        assert not is_same(last, after)
        effattn.restore(model)
        assert_same(last, model(x))


class Shifted(FrozenBatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def activated(norm: nn.BatchNorm2d) -> nn.Module:
    frozen = FrozenBatchNormAct2d(norm.num_features, norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return frozen


@pytest.mark.parametrize("exchange", [Shifted, activated, lambda norm: nn.GroupNorm(1, norm.num_features)])
@pytest.mark.parametrize("name", ["cascade", "v2"])
def test_norms_that_only_resemble_are_called(name, exchange):
    model, x = make(name)
    fast = copy.deepcopy(model)
    effattn.accelerate(fast)
    for module in (model, fast):
        with_norms(exchange)(module)
    with torch.no_grad():
        assert_same(fast(x), model(x))
    effattn.restore(fast)
    assert not effattn.accelerate(fast).replaced


def test_accelerate_convert_restore_and_again():
    model, x = make("cascade")
    with torch.no_grad():
        expected = model(x)
        report = effattn.accelerate(model)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert effattn.restore(model) == 2 + len(report.blocks)
        assert torch.equal(model(x), expected)
        assert len(effattn.accelerate(model).replaced) == 2
        state = {key: value * 0.9 if value.is_floating_point() else value for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        out = model(x)
        effattn.restore(model)
        model.train()  # timm's own bias goes stale
        model.eval()
        assert_same(out, model(x))
