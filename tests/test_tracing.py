"""Accelerated models and modules under torch.jit.trace, torch.fx and, refused, torch.jit.script."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from same import assert_same
from specified import check_module, longest_sum
from tiers import full
from torch import fx, nn

import effattn
from effattn import _library
from effattn import nn as ours
from effattn.testing import (
    import_diffusers,
    import_timm,
    make_image,
    make_tensor,
    randomise_batch_norm,
    randomise_what_starts_at_zero,
)
from effattn.tolerance import check_against

timm, diffusers = import_timm(), import_diffusers()
from timm.models._features_fx import create_feature_extractor as timm_extractor  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402

MODELS = ("efficientvit_b0", "efficientvit_m0", "efficientformer_l1", "efficientformerv2_s0")


def make_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    randomise_batch_norm(model)
    randomise_what_starts_at_zero(model)
    accelerated = copy.deepcopy(model)
    assert effattn.accelerate(accelerated).replaced
    return model, accelerated


# --- torch.jit.trace ------------------------------------------------------------------------------------------


def tracer_warnings(model, x, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, (x,), **options)
    return traced, [w for w in caught if issubclass(w.category, torch.jit.TracerWarning)]


def operators(graph):
    return {node.kind() for node in graph.nodes() if node.kind().startswith("effattn::")}


@pytest.mark.parametrize(
    ("name", "grad"),
    [
        ("efficientvit_b0", True),
        ("efficientformerv2_s0", False),
        *(full(name, grad) for name in MODELS for grad in (False, True)),
    ],
)
def test_traced_models(name, grad):
    """No more warnings than the stock model gives, other batch sizes, saved, loaded, frozen."""
    stock, accelerated = make_model(name)
    x = make_image(1, 3, 224, 224)
    with torch.set_grad_enabled(grad):
        _, expected = tracer_warnings(stock, x, check_trace=False)
        traced, given = tracer_warnings(accelerated, x, check_trace=grad)
    assert len(given) <= len(expected)
    assert operators(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    frozen = torch.jit.freeze(torch.jit.load(file).eval())
    assert operators(frozen.graph)
    others = torch.cat([x, x[:1].flip(2)])
    with torch.no_grad():
        check_module([traced(others), frozen(others)], stock, others)


@pytest.mark.parametrize("grad", [full(False), True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", ["efficientvit_b0", full("efficientvit_m0"), full("efficientformerv2_s0")])
def test_traces_are_differentiable(name, grad):
    """As those of the stock model are, whether they were made with gradients or without."""
    _, accelerated = make_model(name)
    x = make_image(1, 3, 224, 224)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(accelerated, (x,))
    exact = copy.deepcopy(accelerated).double()

    def gradient(model, images):
        images = images.detach().requires_grad_()
        out = model(images)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        return {"gradient": torch.autograd.grad((out * weights).sum(), images)[0]}

    check_against(lambda: gradient(exact, x.double()), gradient(traced, x), longest_sum(exact, x))


@pytest.mark.parametrize("grad", [False, full(True)], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", [full("efficientvit_b0"), "efficientvit_m0", full("efficientformer_l1")])
def test_traces_optimised_for_inference(name, grad):
    stock, accelerated = make_model(name)
    x = make_image(1, 3, 224, 224)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(accelerated, (x,)).eval()))
    with torch.no_grad():
        check_module(traced(x), stock, x)


def test_traces_follow_their_parameters():
    """What is derived from parameters is part of the graph, and images of other sizes are served too."""
    stock, accelerated = make_model("efficientvit_b0")
    with torch.no_grad():
        traced = torch.jit.trace(accelerated, (make_image(1, 3, 64, 64),))
        for model in (traced, stock):
            for parameter in model.parameters():
                parameter.mul_(1.25)
        x = make_image(2, 3, 96, 160)
        check_module(traced(x), stock, x)


def test_a_trace_needs_the_library_alone(tmp_path):
    """Where it runs, the operators must be known, and nothing else of effattn."""
    module = ours.LiteMLA(16, 16, dim=8).eval()
    x = make_image(1, 16, 5, 5)
    with torch.no_grad():
        torch.jit.trace(module, (x,)).save(tmp_path / "trace.pt")
        torch.save((x, module(x)), tmp_path / "data.pt")
    code = (
        "import sys, torch\n"
        f"torch.ops.load_library({str(_library.library_path)!r})\n"
        f"traced = torch.jit.load({str(tmp_path / 'trace.pt')!r})\n"
        f"x, expected = torch.load({str(tmp_path / 'data.pt')!r})\n"
        "torch.testing.assert_close(traced(x), expected)\n"
        "assert not [name for name in sys.modules if name.startswith('effattn')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- torch.fx -------------------------------------------------------------------------------------------------

MODULES = {
    "LiteMLA": lambda: (ours.LiteMLA(16, 16, dim=8), (2, 16, 5, 6)),
    "CascadedGroupAttention": lambda: (ours.CascadedGroupAttention(32, 4, 2, 4, 6, (3, 5)), (2, 32, 6, 6)),
    "LocalWindowAttention": lambda: (ours.LocalWindowAttention(32, 4, 2, 4, 10, 4, (3, 5)), (2, 32, 10, 9)),
    "EfficientFormerAttention": lambda: (ours.EfficientFormerAttention(32, 8, 4, 4, 5), (2, 25, 32)),
    "EfficientFormerV2Attention": lambda: (ours.EfficientFormerV2Attention(32, 8, 4, 4, 5), (2, 32, 5, 5)),
    "EfficientFormerV2AttentionDownsample": lambda: (
        ours.EfficientFormerV2AttentionDownsample(32, 8, 4, 4, 6),
        (2, 32, 6, 6),
    ),
    "SanaMultiscaleLinearAttention": lambda: (sana(), (2, 16, 5, 6)),
}


def sana():
    module = diffusers.models.attention_processor.SanaMultiscaleLinearAttention(16, 16, attention_head_dim=8)
    assert effattn.accelerate(module).replaced
    return module


def make_module(name):
    torch.manual_seed(0)
    module, shape = MODULES[name]()
    return module.eval(), make_tensor(*shape, seed=3)


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_leaves(name):
    """One node for each call, of a module that is called twice too; copied, printed, pickled and run."""
    module, x = make_module(name)
    twice = module if "Downsample" not in name else nn.Identity()
    model = nn.Sequential(module, nn.Identity(), twice)
    graph = fx.symbolic_trace(model)
    graph.graph.lint()
    called = [graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert sum(part is module for part in called) == 1 + (twice is module)
    assert not [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    with torch.no_grad():
        expected = model(x)
        for copied in (
            graph,
            copy.deepcopy(graph),
            pickle.loads(pickle.dumps(graph)),
            fx.Transformer(graph).transform(),
        ):
            assert torch.equal(copied(x), expected)
        assert torch.equal(fx.Interpreter(graph).run(x), expected)
    assert '= getattr(self, "0")(input_1' in graph.code
    with pytest.raises(fx.proxy.TraceError, match=r"cannot be the root that torch\.fx traces"):
        fx.symbolic_trace(module)


@pytest.mark.parametrize("name", ["efficientvit_b0", full("efficientvit_m0"), "efficientformer_l1", full(MODELS[3])])
def test_feature_extraction(name):
    """timm's and torchvision's, which know no leaves of ours; and plain tracing of the whole model."""
    stock, accelerated = make_model(name)
    x = make_image(1, 3, 224, 224)
    for extractor in (timm_extractor, create_feature_extractor):
        names = ["stages.2", "stages.1"]
        # torchvision cannot trace all of the stock models.
        (*expected,) = timm_extractor(stock, names)(x).values()
        (*features,) = extractor(accelerated, names)(x).values()
        for a, b in zip(features, expected, strict=True):
            assert_same(a, b)
    graph = fx.symbolic_trace(accelerated)
    with torch.no_grad():
        assert_same(graph(x), accelerated(x))  # parts one by one, and blocks


def test_hooks_run_once():
    """Those of a module are recorded, as of every module that is no leaf to a tracer, and not called again by it."""
    module, x = make_module("LiteMLA")
    calls = []
    module.register_forward_hook(lambda module, args, out: calls.append(type(out)) or out + 1)
    model = nn.Sequential(module)
    graph = fx.symbolic_trace(model)
    assert calls == [fx.Proxy]
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))
        assert torch.equal(copy.deepcopy(graph)(x), model(x))
    hook = nn.modules.module.register_module_forward_hook(
        lambda part, args, out: out * 2 if type(part) is ours.LiteMLA else None
    )
    try:
        graph = fx.symbolic_trace(model)
    finally:
        hook.remove()
    with torch.no_grad():
        assert torch.equal(graph(x), 2 * module.forward(x) + 1)


# --- torch.jit.script -----------------------------------------------------------------------------------------


def test_scripting_names_the_alternatives():
    _, accelerated = make_model("efficientvit_b0")
    module, _ = make_module("EfficientFormerV2Attention")
    for what in (accelerated, module, nn.Sequential(module)):
        with pytest.raises(
            RuntimeError, match=r"effattn cannot be compiled by torch.jit.script: use torch.compile, "
        ) as e:
            torch.jit.script(what)
        assert "torch.jit.trace, or undo effattn.accelerate with effattn.restore(model) first" in str(e.value)
    module, x = make_module("LiteMLA")
    with torch.no_grad():
        traced = torch.jit.trace(module, (x,))
        assert torch.equal(torch.jit.script(traced)(x), traced(x)), "a trace can be scripted"
