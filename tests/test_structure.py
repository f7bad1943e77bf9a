"""What accelerate takes for a known module: all that the original has, by name and shape, and nothing else."""

from __future__ import annotations

import copy
import functools
from types import MethodType

import pytest
import torch
from same import assert_same, is_same
from tiers import full
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import effattn
from effattn.testing import import_diffusers, import_timm, randomise_batch_norm

import_timm()
import_diffusers()
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention  # noqa: E402  (loadable only now)
from timm.models import efficientformer, efficientformer_v2, efficientvit_mit, efficientvit_msra  # noqa: E402

V2 = {"dim": 24, "key_dim": 5, "num_heads": 4, "attn_ratio": 2}
CASCADE = {"dim": 48, "key_dim": 6, "num_heads": 3, "attn_ratio": 16 / 6, "kernels": (7, 5, 3)}
MODULES = {
    "lite mla": (lambda: efficientvit_mit.LiteMLA(32, 32, scales=(3, 5), norm_layer=nn.BatchNorm2d), (2, 32, 6, 7)),
    "cascade": (lambda: efficientvit_msra.CascadedGroupAttention(**CASCADE, resolution=4), (2, 48, 4, 4)),
    "windows": (
        lambda: efficientvit_msra.LocalWindowAttention(**CASCADE, resolution=10, window_resolution=4),
        (2, 48, 10, 10),
    ),
    "efficientformer": (lambda: efficientformer.Attention(24, 5, 3, 2, 4), (2, 16, 24)),
    "v2": (lambda: efficientformer_v2.Attention2d(**V2, resolution=8, stride=2), (2, 24, 8, 8)),
    "v2, downsampling": (lambda: efficientformer_v2.Attention2dDownsample(**V2, resolution=7), (2, 24, 7, 7)),
    "sana": (lambda: SanaMultiscaleLinearAttention(32, 32, kernel_sizes=(3, 5)), (2, 32, 6, 7)),
}
# What is called, whatever it is.
CALLED = ("norm", "act", "norm_out", "nonlinearity")


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = MODULES[name]
    module = build()
    randomise_batch_norm(module)
    module.eval()
    return module, torch.randn(shape)


def paths(kind: type[nn.Module] = nn.Module) -> list[tuple[str, str]]:
    """Every part of every module, by the module's name and its own."""
    return [
        (name, path)
        for name in MODULES
        for path, part in make(name)[0].named_modules()
        if isinstance(part, kind) and path.rpartition(".")[2] not in CALLED
    ]


def reason(module: nn.Module) -> str:
    """Why the module itself is left alone; nothing it is part of may be replaced either."""
    report = effattn.accelerate(nn.Sequential(module))
    assert "0" not in [entry.module for entry in report.replaced]
    return next(entry.detail for entry in report.left_alone if entry.module == "0")


@pytest.mark.parametrize("name", MODULES)
def test_the_originals_are_replaced(name):
    module, x = make(name)
    with torch.no_grad():
        expected = module(x)
        assert not effattn.accelerate(module).left_alone
        assert_same(module(x), expected)


# --- something that the original has not -----------------------------------------------------------------------


def with_buffer(part):
    part.register_buffer("extra", torch.ones(1))


def with_parameter(part):
    part.extra = nn.Parameter(torch.ones(1))


def with_part(part):
    part.add_module("extra", nn.Identity())


def with_tensor(part):
    part.__dict__["extra"] = torch.ones(1)


@pytest.mark.parametrize("add", [with_buffer, with_parameter, with_part, with_tensor], ids=lambda add: add.__name__)
@pytest.mark.parametrize(("name", "path"), paths(), ids=str)
def test_more_than_the_original_anywhere(name, path, add):
    module, _ = make(name)
    part = module.get_submodule(path)
    if add is with_part and type(part) in (nn.Sequential, nn.ModuleList, efficientvit_msra.ConvNorm):
        add(part)
        assert any(word in reason(module) for word in ("extra", "expected"))  # so many parts
    elif isinstance(part, nn.BatchNorm2d) and add in (with_part, with_tensor):
        return  # its forward is torch's own, and reads neither
    else:
        add(part)
        assert "extra" in reason(module)


@pytest.mark.parametrize(("name", "path"), paths(nn.Conv2d), ids=str)
def test_convolutions_of_a_subclass(name, path):
    module, _ = make(name)
    module.get_submodule(path).__class__ = type("Standardised", (nn.Conv2d,), {})
    assert "is Standardised, not Conv2d" in reason(module)


CONVOLUTIONS = {
    "stride": (3, 3),
    "dilation": (2, 2),
    "padding": (4, 4),
    "padding_mode": "circular",
    "groups": 2,
    "kernel_size": (4, 4),
}


@pytest.mark.parametrize("attribute", CONVOLUTIONS)
@pytest.mark.parametrize(("name", "path"), paths(nn.Conv2d), ids=str)
def test_convolutions_of_another_form(name, path, attribute):
    module, _ = make(name)
    setattr(module.get_submodule(path), attribute, CONVOLUTIONS[attribute])
    assert path.removeprefix("attn.") in reason(module) or "upsample" in reason(module)


@pytest.mark.parametrize(("name", "path"), paths(nn.ModuleList), ids=str)
def test_lists_of_another_length_or_kind(name, path):
    module, _ = make(name)
    parts = module.get_submodule(path)
    if "aggreg" not in path and "multiscale" not in path:  # there may be any number of scales
        parts.append(copy.deepcopy(parts[0]))
        assert "has 4 parts, expected 3" in reason(module)
        del parts[-1]
    parts.append(nn.Identity())
    assert path.removeprefix("attn.") in reason(module)


@pytest.mark.parametrize("name", ["cascade", "efficientformer", "v2", "v2, downsampling"])
def test_tables_of_another_kind_or_shape(name):
    module, _ = make(name)
    table = module.attention_biases.detach()
    module.attention_biases = nn.Parameter(table[:, :-1].clone())
    assert "attention_bias" in reason(module)
    del module.attention_biases
    module.attention_biases = table
    assert "attention_biases, a Tensor" in reason(module) or "plain attribute" in reason(module)
    del module.attention_biases
    module.register_buffer("attention_biases", table)
    assert reason(module) == "unknown buffer attention_biases"
    module, _ = make(name)
    module.attention_bias_idxs = module.attention_bias_idxs[:-1]
    assert "attention_bias" in reason(module)
    module, _ = make(name)
    module.scale = nn.Parameter(torch.ones(1)) if "scale" not in vars(module) else torch.ones(1)
    assert "scale" in reason(module)


def test_linear_layers_without_a_bias_or_of_another_shape():
    for change in ({"bias": False}, {"out_features": 62}):
        module, _ = make("efficientformer")
        module.qkv = nn.Linear(24, **{"out_features": 60, **change})
        assert "qkv has" in reason(module)


# --- code that is not the original's ---------------------------------------------------------------------------


class Own(nn.Module):
    """EfficientFormer's Attention as somebody wrote it anew."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.key_dim, self.scale, self.val_dim = 3, 5, 5**-0.5, 10
        self.qkv, self.proj = nn.Linear(24, 60), nn.Linear(30, 24)
        self.attention_biases = nn.Parameter(torch.randn(3, 16))
        self.register_buffer("attention_bias_idxs", make("efficientformer")[0].attention_bias_idxs)


def of_code(name="Attention", **methods):
    """One whose class has this name and these methods."""
    module = Own().eval()
    module.__class__ = type(name, (nn.Module,), {"forward": rewritten, **methods})
    return module, make("efficientformer")[1]


def rewritten(self, x):
    """Other names, another order, nothing else."""
    heads = self.qkv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
    query, key, value = heads.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
    logits = self.scale * query @ key.mT + self.attention_biases[:, self.attention_bias_idxs]
    return self.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


def with_a_gain(self, x):
    return rewritten(self, x) * self.gain


def through_a_method(self, x):
    return self.finish(rewritten(self, x))


def test_harmless_rewriting_is_taken():
    module, x = of_code(forward=rewritten)
    with torch.no_grad():
        expected = module(x)
        assert len(effattn.accelerate(module).replaced) == 1
        assert_same(module(x), expected)


def test_attributes_that_the_original_does_not_read():
    expected = "its forward reads gain, which the original has not"
    module, _ = of_code(forward=with_a_gain)
    module.gain = 2.0
    assert reason(module) == expected
    module, _ = of_code(forward=with_a_gain, gain=2.0)  # of the class
    assert reason(module) == expected
    module, _ = of_code(forward=through_a_method, finish=lambda self, x: sum(x * self.gain for _ in "1"))
    module.gain = 2.0
    assert reason(module) == expected
    module, _ = of_code()
    module.gain = 2.0  # which nothing reads
    assert len(effattn.accelerate(module).replaced) == 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: 2 * rewritten(self, x),
        lambda self, x: rewritten(self, x).relu(),
        lambda self, x: rewritten(self, x) + x,
        lambda self, x: rewritten(self, x.flip(1)),
    ],
    ids=["scaled", "activated", "residual", "flipped"],
)
def test_code_that_computes_something_else_with_the_same_parts(forward):
    module, _ = of_code(forward=forward)
    state = copy.deepcopy(module.state_dict())
    generator = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert reason(module) == "its forward computes something else in evaluation"
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())


def with_dropout(self, x):
    return nn.functional.dropout(rewritten(self, x), 0.2, self.training)


def with_noise(self, x):
    return rewritten(self, x) + (0.5 if self.training else 0.0)


def with_a_mask(self, x, mask=None):
    return rewritten(self, x)


def with_a_map(self, x):
    self.map = rewritten(self, x)
    return self.map


def by_a_call(self, x):
    raise TypeError("not like this")


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (with_dropout, "its forward computes something else in training"),
        (with_noise, "its forward computes something else in training"),
        (lambda self, x: 1.0009 * rewritten(self, x), "its forward computes something else in evaluation"),
        (with_a_mask, "its forward takes mask, which the original's does not"),
        (with_a_map, "its forward keeps map"),
        (by_a_call, "its forward could not be tried (TypeError: not like this)"),
    ],
    ids=["dropout", "noise", "a gain of a thousandth", "a mask", "a map", "an error"],
)
def test_code_that_computes_something_else_elsewhere(forward, why):
    assert reason(of_code(forward=forward)[0]) == why


@pytest.mark.parametrize("wrap", [functools.wraps, lambda f: lambda g: g], ids=["wrapped", "bare"])
@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (efficientvit_mit.LiteMLA, "_attn"),
        (efficientformer.Attention, "get_attention_biases"),
        (efficientvit_msra.CascadedGroupAttention, "get_attention_biases"),
        (efficientvit_mit.LiteMLA, "forward"),
        (efficientformer_v2.Attention2d, "forward"),
    ],
    ids=str,
)
def test_methods_patched_on_the_class(cls, method, wrap, monkeypatch):
    stock = getattr(cls, method)
    patched = wrap(stock)(lambda self, *args: 3.0 * stock(self, *args))
    monkeypatch.setattr(cls, method, patched)
    name = next(name for name in MODULES if type(make(name)[0]) is cls)
    assert "something else" in reason(make(name)[0])


class ConvNormAct(nn.Module):
    """Of timm's name and parts, in another order."""

    def __init__(self, part):
        super().__init__()
        self.dropout, self.conv, self.norm, self.act = part.dropout, part.conv, part.norm, part.act

    def forward(self, x):
        return nn.functional.hardswish(self.norm(self.conv(x)))


class ConvNorm(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.conv, self.bn = part.conv, part.bn

    def forward(self, x):
        return nn.functional.hardswish(self.bn(self.conv(x)))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "owner", "part", "cls"),
    [
        ("lite mla", "", "proj", ConvNormAct),
        ("cascade", "qkvs", "0", ConvNorm),
        ("v2", "", "q", ConvNorm),
        ("v2, downsampling", "", "v_local", ConvNorm),
    ],
)
def test_a_part_of_a_known_name_that_computes_something_else(name, owner, part, cls, order, grad):
    stock, x = make(name)
    module = copy.deepcopy(stock)
    if order == "after":
        effattn.accelerate(module)
        with torch.no_grad():
            module(x)
    for m in (stock, module):
        m.get_submodule(owner).add_module(part, cls(m.get_submodule(owner).get_submodule(part)))
    if order == "before":
        reason(module)
    with torch.set_grad_enabled(grad):
        assert_same(module(x), stock(x))


class FrozenBatchNorm2d(nn.Module):
    """Of a known name, without the eps that its buffers suggest."""

    def __init__(self, norm):
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x):
        scale = self.weight * self.running_var.rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


def test_a_frozen_norm_of_another_formula():
    stock, x = make("cascade")
    for part in stock.qkvs:
        part.bn.running_var.fill_(1e-5)
        part.bn = FrozenBatchNorm2d(part.bn)
    module = copy.deepcopy(stock)
    reason(module)
    with torch.no_grad():
        assert_same(module(x), stock(x))


def test_a_class_without_a_module():
    """As exec() makes it."""
    namespace = {"nn": nn}
    exec("class LiteMLA(nn.Module):\n    def forward(self, x):\n        return x", namespace)
    namespace["LiteMLA"].forward.__globals__.pop("__name__", None)
    assert "it has no" in reason(namespace["LiteMLA"]())


def test_a_forward_that_was_patched_on_the_class(monkeypatch):
    forward = efficientvit_mit.LiteMLA.forward
    monkeypatch.setattr(efficientvit_mit.LiteMLA, "forward", lambda self, x: 2 * forward(self, x))
    assert reason(make("lite mla")[0]) == "its forward computes something else in evaluation"


def test_code_that_cannot_be_tried_is_known_by_structure():
    module, _ = of_code(forward=lambda self, x: 2 * rewritten(self, x))
    assert len(effattn.accelerate(module.to("meta")).replaced) == 1


def test_methods_replaced_on_the_instance():
    module, _ = make("lite mla")
    module._attn = MethodType(lambda self, q, k, v: v, module)
    assert reason(module) == "its _attn was replaced on the instance"
    module, _ = make("efficientformer")
    module.get_attention_biases = lambda device: 0.0
    assert reason(module) == "its get_attention_biases was replaced on the instance"


def test_classes_with_a_call_of_their_own():
    module, _ = of_code(__call__=lambda self, x: x)
    assert reason(module) == "its class has a __call__ of its own"


def test_a_class_of_another_name_is_not_looked_at():
    module, _ = of_code("TokenMixer")
    report = effattn.accelerate(module)
    assert not report.replaced and not report.left_alone


# --- what torch adds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "add",
    [
        lambda conv: parametrizations.weight_norm(conv),
        lambda conv: parametrizations.spectral_norm(conv).eval(),
        lambda conv: nn.utils.weight_norm(conv),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: parametrize.register_parametrization(conv, "weight", nn.Tanh()),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "pruned", "parametrised"],
)
@pytest.mark.parametrize(
    ("name", "path"),
    [("lite mla", "qkv.conv"), ("lite mla", "aggreg.0.1"), ("cascade", "qkvs.1.conv"), ("efficientformer", "qkv"),
     ("v2", "k.conv"), ("v2", "talking_head1"), ("v2, downsampling", "q.proj.conv"), ("sana", "to_v"),
     ("sana", "to_qkv_multiscale.0.proj_in")],
)  # fmt: skip
def test_weights_that_are_made_of_others(name, path, add, when):
    module, x = make(name)
    if when == "after":
        effattn.accelerate(module)
        with torch.no_grad():
            module(x)
    add(module.get_submodule(path))
    if when == "before":
        reason(module)
        return
    with torch.no_grad():
        out = module(x)
        effattn.restore(module)
        assert_same(out, module(x))


def test_a_pruning_made_permanent_is_served():
    module, x = make("cascade")
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            prune.l1_unstructured(part, "weight", 0.3)
            prune.remove(part, "weight")
    with torch.no_grad():
        expected = module(x)
        assert not effattn.accelerate(module).left_alone
        assert_same(module(x), expected)


def test_a_parametrised_table():
    """The module's class is torch's then, until the parametrization is removed."""
    module, x = make("cascade")
    nn.init.normal_(module.attention_biases)
    effattn.accelerate(module)
    with torch.no_grad():
        before = module(x)
        parametrize.register_parametrization(module, "attention_biases", nn.Tanh())
        out = module(x)
        assert not is_same(out, before)
        assert effattn.restore(module) == 0
        assert torch.equal(module(x), out)
        parametrize.remove_parametrizations(module, "attention_biases")
        assert effattn.restore(module) == 1
        assert_same(module(x), out)


# --- what forward asks of the module at every call -------------------------------------------------------------


def by_scale(module):
    module.scale = 3.0


def by_eps(module):
    module.eps = 0.5


def by_kernel_func(module):
    module.kernel_func = nn.Softplus()


def by_a_hooked_kernel_func(module):
    module.kernel_func.register_forward_hook(lambda part, args, out: out * 2 + 1)


def by_nonlinearity(module):
    module.nonlinearity = nn.Softplus()


def by_residual_connection(module):
    module.residual_connection = True


def by_a_bias(module):
    module.to_k = nn.Linear(32, 32)


def by_adapters(module):
    for name in ("to_q", "to_out"):
        setattr(module, name, nn.Sequential(getattr(module, name), nn.Tanh()))


def by_another_norm(module):
    module.norm_type, module.norm_out = "rms_norm", nn.LayerNorm(32)


def by_activation(module):
    module.act = nn.Hardswish()


def by_talking_head(module):
    module.talking_head1 = nn.Sequential(module.talking_head1, nn.Tanh())


def by_upsampling(module):
    module.upsample = nn.Upsample(scale_factor=2, mode="nearest")


def by_corners(module):
    module.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)


def by_pooling(module):
    module.q.pool = nn.AvgPool2d(2, 2, ceil_mode=True)


def by_a_strided_key(module):
    module.v.conv = nn.Sequential(module.v.conv, nn.Tanh())


def by_a_projection_of_another_class(module):
    class ConvNorm(type(module.proj)):
        def forward(self, x):
            return 2 * super().forward(x)

    ConvNorm.__name__ = "Doubled"
    module.proj.__class__ = ConvNorm


@pytest.mark.parametrize("size", [1, 4], ids=["one operator", "parts"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, by_scale) for name in ("cascade", "efficientformer", "v2", "v2, downsampling")),
        *(("lite mla", change) for change in (by_eps, by_kernel_func, by_a_hooked_kernel_func)),
        ("sana", by_eps),
        *(("sana", change) for change in (by_nonlinearity, by_residual_connection, by_a_bias, by_adapters)),
        ("sana", by_another_norm),
        *(("v2", change) for change in (by_activation, by_talking_head, by_upsampling, by_corners)),
        *((name, by_a_strided_key) for name in ("v2", "v2, downsampling")),
        ("v2, downsampling", by_pooling),
        *((name, by_a_projection_of_another_class) for name in ("lite mla", "v2", "v2, downsampling")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_changes_after_accelerate_count(name, change, grad, size):
    module, x = make(name)
    if size > 1 and name in ("lite mla", "sana"):
        x = torch.randn(1, 32, 22, 23)
    stock = copy.deepcopy(module)
    effattn.accelerate(module)
    with torch.no_grad():
        before = module(x)
    change(module)
    torch.manual_seed(2)
    change(stock)
    if change is by_a_bias:
        stock.load_state_dict(module.state_dict())
    with torch.set_grad_enabled(grad):
        out = module(x)
        assert not is_same(out, before)
        assert_same(out, stock(x))


# --- containers and orders of calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_containers_and_copies(name):
    """A module used twice, models of models, copies, one accelerated twice, one restored in parts."""
    module, x = make(name)
    with torch.no_grad():
        expected = module(x)
        model = nn.ModuleDict({"a": module, "b": nn.DataParallel(module), "c": nn.ModuleList([copy.deepcopy(module)])})
        count = len(effattn.accelerate(model).replaced)
        assert count == 2 * (1 + (name == "windows"))
        again = effattn.accelerate(model)
        assert not again.replaced and {entry.detail for entry in again.left_alone} == {"accelerated already"}
        for part in (model["a"], model["b"], model["c"][0], copy.deepcopy(model)["a"]):
            assert_same(part(x), expected)
        assert effattn.restore(model["c"]) == count // 2
        assert torch.equal(model["c"][0](x), expected)
        assert effattn.restore(model) == count // 2
        assert torch.equal(model["b"](x), expected)


@pytest.mark.parametrize("name", [name if name == "windows" else full(name) for name in MODULES])
def test_compiled_before_and_replaced_then(name):
    module, x = make(name)
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(x)
        assert effattn.accelerate(compiled).replaced
        assert_same(compiled(x), expected)
        assert effattn.restore(compiled)
        assert_same(compiled(x), expected)


def test_scripted_modules_are_left_alone():
    module, x = make("efficientformer")
    scripted = torch.jit.trace(module, (x,))
    assert not effattn.accelerate(nn.Sequential(scripted)).replaced


def test_a_replica_of_data_parallel():
    """It has its parameters as plain attributes, and shares everything else with the module."""
    module = effattn.nn.EfficientFormerAttention(24, 5, 3, 2, 4, dense_prediction=True).eval()
    nn.init.normal_(module.attention_biases_seg)
    x = torch.randn(2, 16, 24)
    with torch.no_grad():
        expected = module(x)
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            twin = child._replicate_for_data_parallel()
            for key, value in child._parameters.items():
                object.__setattr__(twin, key, value.detach().clone())
            replica._modules[name] = twin
        replica.attention_biases_seg = module.attention_biases_seg.detach() * 2
        replica._buffers = dict(module._buffers)
        assert not is_same(replica(x), expected)
        assert_same(module(x), expected)
