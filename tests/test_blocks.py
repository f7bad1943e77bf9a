"""Blocks in models: what accelerate() makes of them, when their program is not what runs, and graphs."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from same import assert_same
from torch import nn
from torch.nn import functional

import effattn
import effattn.export
from effattn.nn.block import Block
from effattn.nn.programs import EMITTERS, Unknown, make_program
from effattn.ops._program import parse
from effattn.testing import import_timm, make_image

timm = import_timm()
mit = pytest.importorskip("timm.models.efficientvit_mit")

OPERATOR = torch.ops.effattn.block.default


def randomise(model: nn.Module) -> nn.Module:
    """Statistics and scales that are not those of a new model."""
    generator = torch.Generator().manual_seed(0)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point() and t.dim() == 1:
            low, high = (0.5, 1.5) if name.endswith("running_var") else (-0.3, 0.4)
            t.data.uniform_(low, high, generator=generator)
    return model.eval()


def stage() -> nn.Module:
    torch.manual_seed(0)
    return randomise(
        nn.Sequential(
            mit.MBConv(24, 32, stride=2, act_layer=(nn.Hardswish, nn.Hardswish, None)),
            mit.ResidualBlock(mit.MBConv(32, 32), nn.Identity()),
            mit.EfficientVitBlock(32, head_dim=16),
        )
    )


def pair(make=stage) -> tuple[nn.Module, nn.Module]:
    """Stock and accelerated, of the same weights."""
    stock = make()
    fast = copy.deepcopy(stock)
    effattn.accelerate(fast)
    return stock, fast


def calls(run) -> int:
    """How often the operator runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == "effattn::block")


X = make_image(1, 24, 18, 15)


def test_a_row_of_blocks_is_one_call():
    stock, fast = pair()
    assert isinstance(fast, Block) and isinstance(fast, nn.Sequential) and len(fast) == 3
    with torch.no_grad():
        assert_same(fast(X), stock(X))
        assert calls(lambda: fast(X)) == 1
        assert calls(lambda: fast[1](stock[0](X))) == 1  # and each of them
    assert "%0 = image(channels=24)" in fast.program and "linear_attention" in fast.program


@pytest.mark.parametrize("memory_format", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    "name", ["efficientvit_b0", "efficientvit_l1", "efficientvit_m2", "efficientformer_l1", "efficientformerv2_s0"]
)
def test_models(name, memory_format):
    """All but heads goes through programs; errors are no more than the stock model's."""
    torch.manual_seed(0)
    stock = randomise(timm.create_model(name))
    fast = copy.deepcopy(stock)
    report = effattn.accelerate(fast)
    assert not report.left_alone and {"stages", "stem", "patch_embed"} & {e.module for e in report.blocks}
    x = make_image(2, 3, 224, 224, memory_format)
    with torch.no_grad():
        truth = copy.deepcopy(stock).double()(x.double())
        off = [(model(x) - truth).norm().item() for model in (fast, stock)]
        assert off[0] <= 1.25 * off[1]
        assert calls(lambda: fast(x)) >= 2


CHANGES = {
    "in place": lambda model: next(model.parameters()).mul_(2),
    "statistics": lambda model: next(b for n, b in model.named_buffers() if "running_mean" in n).add_(1),
    "state dict": lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}),
    "new parameter": lambda model: setattr(
        model[0].inverted_conv.conv, "weight", nn.Parameter(model[0].inverted_conv.conv.weight * 3)
    ),
    "through .data": lambda model: model[0].point_conv.conv.weight.data.mul_(2),
    "eps": lambda model: setattr(model[0].inverted_conv.norm, "eps", 0.5),
    "activation": lambda model: setattr(model[0].inverted_conv, "act", nn.ReLU()),
    "no norm": lambda model: setattr(model[0].inverted_conv, "norm", nn.Identity()),
    "a part that is not known": lambda model: setattr(model[0].inverted_conv, "act", nn.Tanh()),
    "a hook": lambda model: model[0].inverted_conv.conv.register_forward_hook(lambda m, i, o: o * 2),
    "a norm of the batch": lambda model: model[0].inverted_conv.norm.train(),
    "attention's eps": lambda model: setattr(model[2].context_module.main, "eps", 3.0),
    "bfloat16": lambda model: model.bfloat16().float(),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_and_parts_that_change(change, compiled):
    stock, fast = pair()
    with torch.no_grad():
        run = torch.compile(fast, backend="aot_eager") if compiled else fast
        before = run(X)
        for model in (stock, fast):
            CHANGES[change](model)
        expected = stock(X)
        assert_same(run(X), expected)
        assert not torch.equal(expected, before)


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientformer_l1", "efficientformerv2_s0"])
def test_what_attention_looks_up_at_every_call(name):
    torch.manual_seed(0)
    stock, fast = pair(lambda: randomise(timm.create_model(name)))
    x = make_image(1, 3, 224, 224)
    with torch.no_grad():
        before = fast(x)
        for model in (stock, fast):
            for part in model.modules():
                if "scale" in part.__dict__:
                    part.scale = 5.0
        assert_same(fast(x), stock(x))
        assert not torch.equal(fast(x), before)


def test_images_of_many_sizes_pack_weights_once(monkeypatch):
    _, fast = pair()
    with torch.no_grad():
        fast(X)
        monkeypatch.setattr("effattn.nn.block.make_program", None)
        for width in range(8, 40):
            fast(make_image(1, 24, 8, width))


def test_optimizers_are_noticed():
    stock, fast = pair()
    for model in (stock, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        with torch.no_grad():
            model(X)
        model.train()
        model(X).square().mean().backward()
        optimizer.step()
        model.eval()
    with torch.no_grad():
        assert_same(fast(X), stock(X))


def test_what_goes_through_its_own_forward():
    stock, fast = pair(lambda: stage()[:2])  # timm's attention goes through float32
    with torch.no_grad():
        for run in (
            lambda m: m.double()(X.double()),
            lambda m: m.bfloat16()(X.bfloat16()),
            lambda m: m.train()(X),
            lambda m: torch.autocast("cpu", torch.bfloat16)(m)(X),
        ):
            models = [copy.deepcopy(model) for model in (stock, fast)]
            expected, out = (run(model) for model in models)
            assert_same(out, expected)
            assert calls(partial(run, models[1])) == 0
        with effattn.use_backend("reference"):
            assert calls(lambda: fast(X)) == 0
    assert calls(lambda: fast(X)) == 0  # with gradients


def test_gradients_are_the_stock_ones():
    stock, fast = pair()
    grads = []
    for model in (stock, fast):
        x = X.clone().requires_grad_()
        model(x).square().mean().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*reversed(grads), strict=True):
        assert_same(ours, theirs, largest=theirs.abs().max().item() + 1e-3)


def test_copies_and_pickles():
    _, fast = pair()
    with torch.no_grad():
        expected = fast(X)
        graph = torch.compile(fast, backend="aot_eager")
        graph(X)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert isinstance(other, Block) and torch.equal(other(X), expected)
            compiled = torch.compile(other, backend="aot_eager")
            compiled(X)
            next(other.parameters()).mul_(2)
            assert torch.equal(compiled(X), other(X)) and torch.equal(graph(X), expected)
            assert effattn.restore(other) > 0 and type(other) is nn.Sequential


def test_restore():
    stock, fast = pair()
    with torch.no_grad():
        fast(X)
        assert effattn.restore(fast) == effattn.restore(copy.deepcopy(fast)) + len([m for m in effattn_modules(stock)])
        assert torch.equal(fast(X), stock(X)) and type(fast) is nn.Sequential


def effattn_modules(stock: nn.Module) -> list[str]:
    report = effattn.accelerate(copy.deepcopy(stock))
    return [entry.module for entry in (*report.replaced, *report.blocks)]


def test_one_node_and_few_guards():
    stock, fast = pair()
    targets = []

    def backend(graph, inputs):
        names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        targets.append([name for name in names if "functorch" not in name])  # a question, not an operation
        return graph

    with torch.no_grad():
        compiled = torch.compile(fast, backend=backend, fullgraph=True)
        assert_same(compiled(X), stock(X))
    assert targets == [["effattn.block_of_module"]]


def test_other_sizes_in_one_graph():
    stock, fast = pair()
    with torch.no_grad():
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True, dynamic=True)
        for size in ((1, 18, 15), (2, 9, 30), (1, 1, 1)):
            x = make_image(size[0], 24, *size[1:])
            assert_same(compiled(x), stock(x))


def test_a_graph_whose_module_is_gone():
    x = torch.ones(1, 24, 4, 4)
    with pytest.raises(RuntimeError, match="the module that this graph was compiled for is gone"):
        torch.ops.effattn.block_of_module(x, 10**9, "%0 = image(channels=24)\n%1 = mean(%0, channels=24)")


def test_export_keeps_the_parts():
    """An exported program has the weights of its own."""
    stock, fast = pair()
    with torch.no_grad():
        program = torch.export.export(fast, (X,))
        assert_same(program.module()(X), stock(X))
    assert not any("block" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 7)])
def test_small_and_odd_images(size):
    stock, fast = pair()
    x = make_image(3, 24, *size)
    with torch.no_grad():
        assert_same(fast(x), stock(x))


def test_images_of_other_sizes_than_an_attention_was_made_for():
    torch.manual_seed(0)
    stock = randomise(timm.create_model("efficientformer_l1"))
    fast = copy.deepcopy(stock)
    effattn.accelerate(fast)
    with torch.no_grad():
        x = stock.stem(make_image(1, 3, 224, 224))
        assert calls(lambda: fast.stages(x)) == 1
        with pytest.raises(RuntimeError):  # as the stock model, of a bias for 49 tokens
            stock.stages(x[..., :40])


# --- what no program expresses -----------------------------------------------------------------------------------


def conv_norm_act(**options) -> nn.Module:
    return mit.ConvNormAct(32, 32, **options)


def with_conv(conv: nn.Conv2d) -> nn.Module:
    block = conv_norm_act()
    block.conv = conv
    return block


UNKNOWN = {
    "stride (3, 3)": lambda: conv_norm_act(stride=3),
    "stride (1, 2)": lambda: with_conv(nn.Conv2d(32, 32, 3, (1, 2), 1)),
    "dilation (2, 2)": lambda: conv_norm_act(dilation=2),
    "kernel_size (1, 3)": lambda: with_conv(nn.Conv2d(32, 32, (1, 3))),
    "padding (0, 1)": lambda: with_conv(nn.Conv2d(32, 32, 3, padding=(0, 1))),
    "padding same": lambda: with_conv(nn.Conv2d(32, 32, 3, padding="same")),
    "padding_mode 'reflect'": lambda: with_conv(nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")),
    "groups 4 of 32 channels": lambda: conv_norm_act(groups=4),
    "Tanh is not known": lambda: conv_norm_act(act_layer=lambda inplace: nn.Tanh()),
    "GroupNorm is not known": lambda: conv_norm_act(norm_layer=lambda num_features, **_: nn.GroupNorm(4, num_features)),
    "unknown part more": lambda: add(conv_norm_act(), "more"),
    "unknown tensor table": lambda: with_table(conv_norm_act()),
    "it has hooks": lambda: hooked(mit.DSConv(32, 32)),
}


def add(module: nn.Module, name: str) -> nn.Module:
    module.add_module(name, nn.Identity())
    return module


def with_table(module: nn.Module) -> nn.Module:
    module.register_buffer("table", torch.ones(3))
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.depth_conv.conv.register_forward_hook(lambda m, i, o: o)
    return module


@pytest.mark.parametrize("reason", UNKNOWN)
def test_left_alone_with_a_reason(reason):
    model = nn.ModuleDict({"block": UNKNOWN[reason]().eval()})
    with pytest.raises(Unknown) as unknown:
        make_program(model["block"], EMITTERS)
    assert reason in str(unknown.value)
    report = effattn.accelerate(model)
    found = {entry.module: entry.detail for entry in report.left_alone}
    assert reason in found["block"]
    assert not isinstance(model["block"], Block)


class ConvLayer(nn.Module):
    """As the official repository has it."""

    def __init__(self, in_channels, out_channels, kernel_size=3, groups=1, norm=nn.BatchNorm2d, act=nn.Hardswish):
        super().__init__()
        self.dropout = None
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.norm = norm(out_channels) if norm else None
        self.act = act() if act else None

    def forward(self, x):
        if self.dropout is not None:
            x = self.dropout(x)
        x = self.conv(x)
        if self.norm:
            x = self.norm(x)
        if self.act:
            x = self.act(x)
        return x


class MBConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.inverted_conv = ConvLayer(channels, 2 * channels, 1)
        self.depth_conv = ConvLayer(2 * channels, 2 * channels, groups=2 * channels)
        self.point_conv = ConvLayer(2 * channels, channels, 1, act=None)

    def forward(self, x):
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


def test_classes_of_nobodys_library_are_tried():
    stock, fast = pair(lambda: randomise(MBConv(24)))
    assert isinstance(fast, Block)
    with torch.no_grad():
        assert_same(fast(X), stock(X))
        assert calls(lambda: fast(X)) == 1


def test_a_class_that_computes_something_else():
    other = type("MBConv", (MBConv,), {"forward": lambda self, x: functional.relu(MBConv.forward(self, x))})
    model = nn.ModuleDict({"block": other(24).eval()})
    effattn.accelerate(model)
    assert not isinstance(model["block"], Block)


def test_the_report_is_short():
    report = effattn.accelerate(timm.create_model("efficientvit_b1"))
    assert len(str(report).splitlines()) < 15 and len(report.blocks) > 50
    assert "stages: torch.nn.modules.container.Sequential -> one program, " in str(report)


def test_programs_are_readable():
    program = pair()[1].program
    assert all(line.startswith(f"%{i} = ") for i, line in enumerate(program.splitlines()))
    assert [step.text(i) for i, step in enumerate(parse(program))] == program.splitlines()


# --- frozen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["efficientvit_b0", "efficientformer_l1"])
def test_frozen_models_are_exported_with_operators(name):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name))
    x = make_image(2, 3, 224, 224)
    with torch.no_grad():
        frozen = effattn.export.freeze(model)
        assert_same(frozen(x), model(x))
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(frozen, (x,), dynamic_shapes=({0: batch},))
        assert sum(node.target is OPERATOR for node in program.graph.nodes) >= 2
        assert_same(program.module()(x[:1]), model(x[:1]))
        assert not any(isinstance(part, Block) for part in model.modules())  # the model stays as it is
        next(model.parameters()).mul_(2)
        assert_same(program.module()(x), frozen(x))


def test_a_frozen_block_is_compiled_ahead_of_time(tmp_path):
    stock = stage()
    with torch.no_grad():
        program = torch.export.export(effattn.export.freeze(stock), (X,))
        with torch._inductor.config.patch({"cpp.vec_isa_ok": False, "aot_inductor.precompile_headers": False}):
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        assert_same(torch._inductor.aoti_load_package(package)(X), stock(X))


@pytest.mark.parametrize("kind", ["accelerated", "inside of another", "with an unknown part"])
def test_what_is_frozen(kind):
    stock = stage()
    if kind == "accelerated":
        effattn.accelerate(stock)
    if kind == "inside of another":
        stock = nn.Sequential(nn.Conv2d(24, 24, 1), stock)
    if kind == "with an unknown part":
        stock[1].main.inverted_conv.act = nn.Tanh()
    frozen = effattn.export.freeze(stock)
    count = sum(isinstance(part, effattn.export.FrozenBlock) for part in frozen.modules())
    assert count == (4 if kind == "with an unknown part" else 1)
    with torch.no_grad():
        assert_same(frozen(X), stock(X))


def test_nothing_to_freeze():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        effattn.export.freeze(3)
    with pytest.raises(RuntimeError, match="expected a model with blocks that effattn knows"):
        effattn.export.freeze(nn.Linear(3, 3))
