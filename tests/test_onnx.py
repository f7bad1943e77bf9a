"""Functions, modules and accelerated models through both ONNX exporters: standard operators, which onnxruntime runs."""

from __future__ import annotations

import copy

import pytest
import torch
from exported_to_onnx import count, export, run
from specified import AsModule, check_module, free_sizes, publicly
from tiers import full
from torch import nn

import effattn
from effattn import nn as ours
from effattn.ops import OPERATORS
from effattn.testing import (
    import_diffusers,
    import_timm,
    make_arguments,
    make_image,
    make_tensor,
    randomise_batch_norm,
    randomise_what_starts_at_zero,
)

timm, diffusers = import_timm(), import_diffusers()
EXPORTERS = ("traced", "dynamo")
#: In the short tier one call of each test goes through the second, which takes seconds: torch's own graph is the same.
by_exporter = pytest.mark.parametrize("exporter", EXPORTERS)


def of_operator(operator, case, dtype=torch.float32):
    """A call as a module, its images, and the dimensions of those that may have any size, by number."""
    arguments = make_arguments(operator, case, dtype)
    free = set(free_sizes(operator, case))
    images = tuple(arguments[: operator.signature.num_activations])
    dims = (argument.shapes[0].dims for argument in operator.signature.arguments)
    dynamic = [
        {i: dim.text for i, dim in enumerate(of_one, start=image.dim() - len(of_one)) if dim.text in free}
        for image, of_one in zip(images, dims, strict=False)
    ]
    return AsModule(operator, arguments, publicly(operator)), images, dynamic


PUBLIC = [
    pytest.param(op, case, id=f"{op.name}-{i}")
    for op in OPERATORS.values()
    if op.name in effattn.__all__
    for i, case in enumerate(op.cases[:2])
]


def larger(images, dynamic):
    """Images of other sizes, the same size for the same name."""
    sizes = [
        [size + ord(dims[i][0]) % 5 + 1 if i in dims else size for i, size in enumerate(t.shape)]
        for t, dims in zip(images, dynamic, strict=True)
    ]
    return tuple(make_tensor(*size, seed=5 + i).to(images[0].dtype) for i, size in enumerate(sizes))


@by_exporter
@pytest.mark.parametrize(("operator", "case"), PUBLIC)
@pytest.mark.each_value
def test_functions(operator, case, exporter):
    """At the sizes of the export, and a graph with dynamic sizes at others."""
    module, images, dynamic = of_operator(operator, case)
    graphs = [(export(module, images, exporter), images)]
    if case is operator.cases[0]:
        graphs.append((export(module, images, exporter, dynamic), larger(images, dynamic)))
    for exported, given in graphs:
        check_module(run(exported, *given), module, *given, terms=operator.longest_sum(case))


@by_exporter
@pytest.mark.parametrize(("operator", "case"), PUBLIC)
@pytest.mark.each_value
def test_functions_in_half_precision(operator, case, exporter):
    """Sums in float32, as in the plain formulation: float16 does not overflow."""
    module, images, _ = of_operator(operator, case, torch.float16)
    images = tuple(t * 200 for t in images)
    result = run(export(module, images, exporter), *images)
    assert result.dtype == torch.float16 and result.isfinite().all()
    check_module(result, module, *images, terms=operator.longest_sum(case))


MODULES = {
    "LiteMLA": (lambda: ours.LiteMLA(32, 32, dim=8, scales=(3, 5)), (2, 32, 5, 7), {0: "b", 2: "h", 3: "w"}),
    "CascadedGroupAttention": (lambda: ours.CascadedGroupAttention(32, 4, 2, 4, 6, (3, 5)), (2, 32, 6, 6), {0: "b"}),
    "LocalWindowAttention": (
        lambda: ours.LocalWindowAttention(32, 4, 2, 4, 10, 4, (3, 5)),
        (2, 32, 10, 9),
        {0: "b", 2: "h", 3: "w"},
    ),
    "EfficientFormerAttention": (lambda: ours.EfficientFormerAttention(32, 8, 4, 4, 5), (2, 25, 32), {0: "b"}),
    "EfficientFormerV2Attention": (lambda: ours.EfficientFormerV2Attention(32, 8, 4, 4, 5), (2, 32, 5, 5), {0: "b"}),
    "EfficientFormerV2Attention, stride": (
        lambda: ours.EfficientFormerV2Attention(32, 8, 4, 4, 6, stride=2),
        (2, 32, 6, 6),
        {0: "b"},
    ),
    "EfficientFormerV2AttentionDownsample": (
        lambda: ours.EfficientFormerV2AttentionDownsample(32, 8, 4, 4, 6, 40),
        (2, 32, 6, 6),
        {0: "b"},
    ),
}


def sana():
    module = diffusers.models.attention_processor.SanaMultiscaleLinearAttention(
        32, 32, attention_head_dim=8, norm_type="rms_norm", residual_connection=True
    )
    assert effattn.accelerate(module).replaced
    return module


MODULES["SanaMultiscaleLinearAttention"] = (sana, (2, 32, 5, 7), {0: "b", 2: "h", 3: "w"})


def make_module(name):
    torch.manual_seed(0)
    make, shape, dynamic = MODULES[name]
    module = make().eval()
    randomise_batch_norm(module)
    randomise_what_starts_at_zero(module)
    return module, make_tensor(*shape, seed=3), [dynamic]


@by_exporter
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.each_value
def test_modules(name, exporter):
    module, x, dynamic = make_module(name)
    with torch.no_grad():
        before = module(x)
        kept = set(module.__dict__)
    exported = export(module, (x,), exporter, dynamic)
    with torch.no_grad():
        assert set(module.__dict__) <= kept  # nothing of the export stays
        assert torch.equal(module(x), before)
    for given in (x, *larger((x,), dynamic)):
        check_module(run(exported, given), module, given)


@by_exporter
def test_convolutions_stay_convolutions(exporter):
    """Engines run those best: a product of matrices is left for attention alone."""
    module, x, _ = make_module("LiteMLA")
    exported = export(module, (x,), exporter)
    assert count(exported, "Conv") == 2 + 2 * 2  # projections, and two for each scale
    assert count(exported, "MatMul") + count(exported, "Gemm") == 3  # keys with values, queries with both sums
    assert count(exported, "Reshape") <= 2 + 2 * (exporter == "traced")


@pytest.mark.parametrize("name", ["LiteMLA", "CascadedGroupAttention", "EfficientFormerV2Attention"])
def test_modules_in_training_mode(name):
    """With the statistics of the batch, which the exporter that traces can keep."""
    module, x, _ = make_module(name)
    module.train()
    state = copy.deepcopy(module.state_dict())
    exported = export(module, (x,), "traced", training=torch.onnx.TrainingMode.TRAINING, do_constant_folding=False)
    module.load_state_dict(state)  # the trace is a step of training
    assert any(node.op_type == "BatchNormalization" for node in exported.graph.node)
    check_module(run(exported, x), module, x)


class Decoder(nn.Module):
    """Of an autoencoder, with its encoder: tensors in, tensors out."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x):
        return self.autoencoder(x, return_dict=False)[0]


def make_model(name):
    torch.manual_seed(0)
    if name == "DC-AE":
        sides = {
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in {
                "block_types": ("ResBlock", "EfficientViTBlock"),
                "block_out_channels": (16, 32),
                "layers_per_block": (1, 1),
                "qkv_multiscales": ((), (5,)),
            }.items()
        }
        model = Decoder(diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=8, **sides))
        x = make_image(2, 3, 32, 32)
    else:
        model, x = timm.create_model(name), make_image(2, 3, 224, 224)
    randomise_batch_norm(model)
    randomise_what_starts_at_zero(model)
    accelerated = copy.deepcopy(model)
    assert effattn.accelerate(accelerated).replaced
    return model.eval(), accelerated.eval(), x


MODELS = ("efficientvit_b0", "efficientvit_m0", "efficientformer_l1", "efficientformerv2_s0")


@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        ("efficientvit_b0", "traced"),
        full("efficientformerv2_s0", "traced"),
        ("DC-AE", "dynamo"),  # the other makes no valid graph of movedim, which its other blocks have
        full("efficientvit_m0", "traced"),
        full("efficientformer_l1", "traced"),
        *(full(name, "dynamo") for name in MODELS),
    ],
)
def test_models(name, exporter):
    """As accurate as the stock model's export, with as many nodes, and at another batch size."""
    stock, accelerated, x = make_model(name)
    dynamic = [{0: "b"}]
    of_accelerated = export(accelerated, (x,), exporter, dynamic)
    given = torch.cat([x, x[:1].flip(3)])
    check_module(run(of_accelerated, given), stock, given)
    if exporter == "dynamo" and name != "efficientvit_b0":  # takes long, and differs in nothing that is ours
        return
    of_stock = export(stock, (x,), exporter, dynamic)
    constants = (count(exported, "Constant") for exported in (of_stock, of_accelerated))
    nodes = [len(exported.graph.node) - n for exported, n in zip((of_stock, of_accelerated), constants, strict=True)]
    assert nodes[1] <= 1.05 * nodes[0]
    assert count(of_accelerated, "Conv") >= count(of_stock, "Conv")


@pytest.mark.parametrize(
    ("name", "grad"),
    [
        ("LiteMLA", False),
        *(full(name, False) for name in MODULES if name != "LiteMLA"),
        full("LiteMLA", True),
        ("CascadedGroupAttention", True),
    ],
)
def test_exported_programs(name, grad):
    """Their graphs hold operators of effattn already: of inference, or those that a backward follows."""
    module, x, _ = make_module(name)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    assert any("effattn" in str(node.target) for node in program.graph.nodes)
    exported = export(program, (), "dynamo")
    given = torch.cat([x, x[:1]])
    check_module(run(exported, given), module, given)
    assert any("effattn" in str(node.target) for node in program.graph.nodes)
    again = program.run_decompositions()
    assert any("effattn" in str(node.target) for node in again.graph.nodes)  # for nobody but the exporter


def test_traces():
    """What torch.jit.trace made holds operators that the exporter knows nothing of, and says what to do."""
    module, x, _ = make_module("LiteMLA")
    with torch.no_grad():
        traced = torch.jit.trace(module, (x,))
        with effattn.use_backend("reference"):
            plain_trace = torch.jit.trace(module, (x,))
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"give it the module itself, or .*use_backend\(\"reference"):
        export(traced, (x,), "traced")
    check_module(run(export(plain_trace, (x,), "traced"), x), module, x)


@pytest.mark.parametrize("opset", [11, 13, 18, 20])
@pytest.mark.parametrize("name", ["LiteMLA", "LocalWindowAttention", "EfficientFormerV2Attention"])
@pytest.mark.each_value
def test_opsets(name, opset):
    module, x, _ = make_module(name)
    check_module(run(export(module, (x,), "traced", opset=opset), x), module, x)


@by_exporter
@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", enabled=False)],
    ids=["no_grad", "inference_mode", "autocast off"],
)
@pytest.mark.each_value
def test_contexts(context, exporter):
    module, x, _ = make_module("LocalWindowAttention")
    module.to(memory_format=torch.channels_last)
    with context():
        exported = export(module, (x.to(memory_format=torch.channels_last),), exporter)
    check_module(run(exported, x), module, x)


@by_exporter
def test_after_compiling_and_of_a_part(exporter):
    """A part of an accelerated model, which torch.compile has seen, by keyword."""
    _, accelerated, _ = make_model("efficientvit_b0")
    block = accelerated.stages[2].blocks[1].context_module
    features = make_image(1, 64, 6, 6)
    with torch.no_grad():
        compiled = torch.compile(block, backend="eager")(features)
        exported = (
            export(block, (), exporter, kwargs={"x": features})
            if exporter == "dynamo"
            else export(block, (features,), exporter)
        )
    assert compiled.shape == features.shape
    check_module(run(exported, features), block, features)


def test_forced_backends_do_not_matter():
    """Kernels are no answer to an exporter, whoever asks for them."""
    operator, case = PUBLIC[0].values
    module, images, _ = of_operator(operator, case)
    with effattn.use_backend("cpu"):
        exported = export(module, images, "traced")
    assert not any("effattn" in node.op_type for node in exported.graph.node)
    assert effattn.registry.choose(operator.name, torch.device("cpu"), torch.float32).name == "cpu"
