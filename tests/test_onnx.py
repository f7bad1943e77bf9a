"""Functions, modules and accelerated models through both ONNX exporters: standard operators, which onnxruntime runs."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings

import onnx
import onnxruntime
import pytest
import torch
from tiers import full
from torch import nn

import effattn
from effattn import nn as ours
from effattn.testing import (
    FLOAT32_FORWARD_TOLERANCE,
    BiasedCase,
    CascadeCase,
    MultiScaleCase,
    allowed_error,
    error,
    import_diffusers,
    import_timm,
    make_image,
    make_tensor,
    randomise_batch_norm,
    randomise_what_starts_at_zero,
)

timm, diffusers = import_timm(), import_diffusers()
EXPORTERS = ("traced", "dynamo")
#: In the short tier one call of each test goes through the second, which takes seconds: torch's own graph is the same.
by_exporter = pytest.mark.parametrize("exporter", EXPORTERS)


def export(model, args, exporter, dynamic=None, opset=None, **options):
    """The model as ONNX has it, checked; ``dynamic``: by input, names of its dynamic dimensions by number."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if exporter == "traced":
            names = [f"input_{i}" for i in range(len(args))]
            axes = {f"input_{i}": sizes for i, sizes in enumerate(dynamic or ())}
            file = io.BytesIO()
            torch.onnx.export(
                model,
                args,
                file,
                dynamo=False,
                opset_version=opset or 17,
                input_names=names,
                dynamic_axes=axes,
                **options,
            )
            exported = onnx.load_model_from_string(file.getvalue())
        else:
            shapes = dynamic and tuple({dim: torch.export.Dim.DYNAMIC for dim in sizes} for sizes in dynamic)
            shapes = (shapes,) if shapes and isinstance(model, Calls) else shapes
            program = torch.onnx.export(model, args, dynamo=True, opset_version=opset, dynamic_shapes=shapes, **options)
            exported = program.model_proto
    onnx.checker.check_model(exported, full_check=True)
    assert {node.domain for node in exported.graph.node} <= {"", "ai.onnx"}
    assert not exported.functions
    return exported


def run(exported, *args):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(exported.SerializeToString(), options)
    feed = {given.name: t.numpy() for given, t in zip(session.get_inputs(), args, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def count(exported, operator):
    return sum(node.op_type == operator for node in exported.graph.node)


class Calls(nn.Module):
    """A function with its weights as buffers; images are inputs."""

    def __init__(self, function, images, weights, **options):
        super().__init__()
        self.function, self.options, self.images = function, options, images
        self.lists = {}
        for name, value in weights.items():
            self.lists[name] = None if isinstance(value, torch.Tensor) else len(value)
            for i, t in enumerate([value] if isinstance(value, torch.Tensor) else value):
                self.register_buffer(f"{name}_{i}", t)

    def forward(self, *images):
        weights = {
            name: getattr(self, f"{name}_0") if n is None else [getattr(self, f"{name}_{i}") for i in range(n)] or None
            for name, n in self.lists.items()
        }
        return self.function(**dict(zip(self.images, images, strict=True)), **weights, **self.options)


def of_case(function, case, dtype=torch.float32, **options):
    inputs = case.inputs(dtype)
    images = tuple(inputs.pop(name) for name in case.images)
    return Calls(function, case.images, inputs, **options), images


def attention_call(dtype=torch.float32):
    images = tuple(make_tensor(2, 3, n, c, seed=c, dtype=dtype) for n, c in ((9, 8), (7, 8), (7, 5)))
    return Calls(effattn.relu_linear_attention, ("q", "k", "v"), {}, eps=1e-5), images


MULTI_SCALE = MultiScaleCase(2, 2, 8, 5, 6, (3, 5), biases=True)
CASCADE = CascadeCase(2, 32, 4, 9, 8, (4, 3), (3, 5))
#: By name: what makes module and images of a dtype, and sizes that the function takes any of.
FUNCTIONS = {
    "relu_linear_attention": (attention_call, [{0: "b", 2: "n"}, {0: "b", 2: "m"}, {0: "b", 2: "m"}]),
    "multi_scale_aggregation": (
        lambda dtype=torch.float32: of_case(effattn.multi_scale_aggregation, MULTI_SCALE, dtype, head_dim=8),
        [{0: "b", 2: "h", 3: "w"}],
    ),
    "multi_scale_linear_attention": (
        lambda dtype=torch.float32: of_case(effattn.multi_scale_linear_attention, MULTI_SCALE, dtype, head_dim=8),
        [{0: "b", 2: "h", 3: "w"}],
    ),
    "biased_attention": (
        lambda dtype=torch.float32: of_case(effattn.biased_attention, BiasedCase(2, 4, 9, 7, 8, 5), dtype),
        [{0: "b"}] * 3,
    ),
    "biased_attention, talking heads": (
        lambda dtype=torch.float32: of_case(effattn.biased_attention, BiasedCase(2, 4, 9, 7, 8, 5, True), dtype),
        [{0: "b"}] * 3,
    ),
    "cascaded_group_attention": (
        lambda dtype=torch.float32: of_case(effattn.cascaded_group_attention, CASCADE, dtype, window_size=(4, 3)),
        [{0: "b", 2: "h", 3: "w"}],
    ),
}


def larger(images, dynamic):
    """Images of other sizes, the same size for the same name."""
    more = {"b": 1, "n": 3, "m": 2, "h": 2, "w": 5}
    sizes = [
        [size + more.get(dims.get(i), 0) for i, size in enumerate(t.shape)]
        for t, dims in zip(images, dynamic, strict=True)
    ]
    return tuple(make_tensor(*size, seed=5 + i).to(images[0].dtype) for i, size in enumerate(sizes))


@by_exporter
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.each_value
def test_functions(name, exporter):
    """At the sizes of the export, and of a graph with dynamic sizes at others."""
    make, dynamic = FUNCTIONS[name]
    module, images = make()
    for exported, given in (
        (export(module, images, exporter), images),
        (export(module, images, exporter, dynamic), larger(images, dynamic)),
    ):
        truth = copy.deepcopy(module).double()(*(t.double() for t in given))
        with effattn.use_backend("reference"):
            plain = module(*given)
        assert error(run(exported, *given), truth) <= allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)


@by_exporter
def test_queries_without_a_positive_channel(exporter):
    """The smallest eps stays in the graph: their output is 0, not 0 / 0."""
    module, images = attention_call()
    module.options["eps"] = 1e-15
    images[0][:, :, 4] = -1
    assert (run(export(module, images, exporter), *images)[:, :, 4] == 0).all()


@by_exporter
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.each_value
def test_functions_in_half_precision(name, exporter):
    """Sums in float32, as in the reference: float16 does not overflow."""
    module, images = FUNCTIONS[name][0](torch.float16)
    images = tuple(t * 200 if name.startswith(("relu", "multi")) else t for t in images)
    with effattn.use_backend("reference"):
        plain = module(*images)
    result = run(export(module, images, exporter), *images)
    assert result.dtype == torch.float16 and result.isfinite().all()
    truth = copy.deepcopy(module).double()(*(t.double() for t in images))
    # What is left is the rounding of the result; of the same number, to either side.
    half_ulp = 2.0**-11 * truth.norm().item()
    assert error(result, truth) <= max(allowed_error(plain, truth, 0), half_ulp)


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


def plain_and_truth(module, x):
    """In float32 through the reference, and in float64."""
    with torch.no_grad(), effattn.use_backend("reference"):
        return module(x), copy.deepcopy(module).double()(x.double())


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
        plain, truth = plain_and_truth(module, given)
        assert error(run(exported, given), truth) <= 2 * allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)


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
    plain, truth = plain_and_truth(copy.deepcopy(module), x)
    assert any(node.op_type == "BatchNormalization" for node in exported.graph.node)
    assert error(run(exported, x), truth) <= 2 * allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)


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
        ("efficientformerv2_s0", "traced"),
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
    with torch.no_grad():
        truth, plain = copy.deepcopy(stock).double()(given.double()), stock(given)
    # Sums in another order: as far off as the plain formulation, to another side.
    assert error(run(of_accelerated, given), truth) <= 2 * allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)
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
    plain, truth = plain_and_truth(module, given)
    assert error(run(exported, given), truth) <= 2 * allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)
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
    plain, truth = plain_and_truth(module, x)
    result = run(export(plain_trace, (x,), "traced"), x)
    assert error(result, truth) <= 2 * allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)


@pytest.mark.parametrize("opset", [11, 13, 18, 20])
@pytest.mark.parametrize("name", ["LiteMLA", "LocalWindowAttention", "EfficientFormerV2Attention"])
@pytest.mark.each_value
def test_opsets(name, opset):
    module, x, _ = make_module(name)
    plain, truth = plain_and_truth(module, x)
    result = run(export(module, (x,), "traced", opset=opset), x)
    assert error(result, truth) <= 2 * allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)


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
    plain, truth = plain_and_truth(module, x)
    assert error(run(exported, x), truth) <= 2 * allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)


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
    plain, truth = plain_and_truth(block, features)
    assert error(run(exported, features), truth) <= 2 * allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)


def test_forced_backends_do_not_matter():
    """Kernels are no answer to an exporter, whoever asks for them."""
    module, images = FUNCTIONS["relu_linear_attention"][0]()
    with effattn.use_backend("cpu"):
        exported = export(module, images, "traced")
    assert not any("effattn" in node.op_type for node in exported.graph.node)
    assert effattn.registry.choose("relu_linear_attention", torch.device("cpu"), torch.float32).name == "cpu"
