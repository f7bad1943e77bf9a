"""effattn.export.to_onnx: models with effattn's nodes, and without, as the engines run them."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import onnx
import onnxruntime
import pytest
import torch
from same import assert_same
from tiers import full
from torch import nn

import effattn
from effattn import _library
from effattn import nn as ours
from effattn.__main__ import main
from effattn.export import to_onnx
from effattn.testing import (
    import_diffusers,
    import_timm,
    make_image,
    randomise_batch_norm,
    randomise_what_starts_at_zero,
)

timm = import_timm()
#: Of softmax attention, of the cascade, of linear attention at several scales and of linear attention alone.
ALL = sorted(_library.node_operators())


def randomised(module):
    randomise_batch_norm(module)
    randomise_what_starts_at_zero(module)
    module.eval()  # of some of timm's it returns nothing
    return module


def sana():
    import_diffusers()
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

    return SanaMultiscaleLinearAttention(32, 32, attention_head_dim=8, norm_type="rms_norm", residual_connection=True)


#: Modules, their images, which dimensions may have any size, and the node of each.
MODULES = {
    "LiteMLA": (lambda: ours.LiteMLA(32, 32, dim=8, scales=(3, 5), use_bias=True), (2, 32, 5, 7), "bhw", ALL[2]),
    "LiteMLA without scales": (lambda: ours.LiteMLA(32, 32, dim=8, scales=()), (2, 32, 6, 6), "bhw", ALL[2]),
    "CascadedGroupAttention": (
        lambda: ours.CascadedGroupAttention(32, 4, 2, 4, 6, (3, 5)),
        (1, 32, 6, 6),
        "b",
        ALL[1],
    ),
    "LocalWindowAttention": (
        lambda: ours.LocalWindowAttention(32, 4, 2, 4, 10, 4, (3, 5)),
        (1, 32, 10, 9),
        "bhw",
        ALL[1],
    ),
    "SanaMultiscaleLinearAttention": (sana, (2, 32, 5, 7), "bhw", ALL[2]),
    "EfficientFormerAttention": (lambda: ours.EfficientFormerAttention(32, 8, 4, 4, 5), (1, 25, 32), "b", ALL[0]),
    "EfficientFormerV2Attention": (
        lambda: ours.EfficientFormerV2Attention(32, 8, 4, 4, 5),
        (2, 32, 5, 5),
        "b",
        ALL[0],
    ),
}
DIMENSIONS = {"b": 0, "h": 2, "w": 3}


def run(model, *inputs, engine="onnxruntime"):
    if engine == "OpenVINO":
        compiled = effattn.openvino.compile(model, config={"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(compiled([t.numpy() for t in inputs])[0].copy())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = effattn.onnxruntime.session(model, options)
    feed = {given.name: t.numpy() for given, t in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.each_value
@pytest.mark.parametrize("engine", ["onnxruntime", "OpenVINO"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, engine):
    """As the module computes, at the sizes of the export and at others."""
    torch.manual_seed(0)
    make, shape, free, node = MODULES[name]
    module = randomised(make())
    x = torch.randn(shape)
    dynamic = [{DIMENSIONS[dim]: dim for dim in free}]
    exported = to_onnx(module, x, operators=[node], dynamic=dynamic)
    assert exported.nodes == {node: 1}
    other = torch.randn([size + 1 + dim if dim in dynamic[0] else size for dim, size in enumerate(shape)])
    for given in (x, other):
        with torch.no_grad():
            assert_same(run(exported.model, given, engine=engine), module(given))


@pytest.mark.parametrize("name", ["LocalWindowAttention", *(full(n) for n in MODULES if n != "LocalWindowAttention")])
def test_modules_in_standard_operators(name):
    torch.manual_seed(0)
    make, shape, _, _ = MODULES[name]
    module = randomised(make())
    x = torch.randn(shape)
    exported = to_onnx(module, x, operators="standard")
    assert not exported.nodes and not any(node.domain for node in exported.model.graph.node)
    session = onnxruntime.InferenceSession(exported.model.SerializeToString())  # without the library
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert_same(torch.from_numpy(result), module(x))


class Tokens(nn.Module):
    """What model code makes of a function: projections, heads, a call."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(24, 72)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return getattr(effattn, ALL[3])(q, k, v)


def test_functions_in_anybodys_model():
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(2, 9, 24)
    exported = to_onnx(model, x, dynamic=[{0: "batch", 1: "tokens"}], input_names=["tokens"], output_names=["mixed"])
    assert exported.nodes == {ALL[3]: 1}
    (given,), (out,) = exported.model.graph.input, exported.model.graph.output
    assert (given.name, out.name) == ("tokens", "mixed")
    assert [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim] == ["batch", "tokens", 24]
    longer = torch.randn(3, 40, 24)
    with torch.no_grad():
        assert_same(run(exported.model, longer), model(longer))


def model_of(name):
    torch.manual_seed(0)
    return randomised(timm.create_model(name))


MODELS = {
    "efficientvit_b0": {ALL[2]: 4},
    "efficientvit_m0": {ALL[1]: 6},
    "efficientformerv2_s0": {},
    "efficientformer_l1": {},
}


@pytest.mark.full
@pytest.mark.parametrize("engine", ["onnxruntime", "OpenVINO"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, engine, tmp_path):
    """The same answers; the model as it was; a file without anything of this machine, weights once."""
    model, x = model_of(name), make_image(1, 3, 224, 224)
    before, state = {type(module) for module in model.modules()}, copy.deepcopy(model.state_dict())
    path = tmp_path / "model.onnx"
    exported = to_onnx(model, x, path, dynamic=[{0: "batch"}])
    assert exported.path == path and exported.nodes == MODELS[name] and str(path) in str(exported)
    assert {type(module) for module in model.modules()} == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    images = torch.cat([x, x.flip(3)])
    with torch.no_grad():
        right = model(images)
    assert_same(run(path, images, engine=engine), right)
    written = path.read_bytes()
    for secret in (str(tmp_path), sys.prefix, "site-packages", ".py"):
        assert secret.encode() not in written
    parameters = sum(t.numel() * t.element_size() for t in model.parameters())
    assert len(written) <= 1.1 * parameters + 300_000
    loaded = onnx.load_from_string(written)
    assert loaded.ir_version == 9 and {o.domain: o.version for o in loaded.opset_import}[""] == 20
    assert {entry.key: entry.value for entry in loaded.metadata_props} == {"effattn": effattn.__version__}
    # Accelerated before, it is the same file.
    effattn.accelerate(model)
    again = to_onnx(model, x, dynamic=[{0: "batch"}])
    assert again.nodes == exported.nodes
    assert_same(run(again.model, images, engine=engine), right)


@pytest.mark.full
def test_softmax_attention_is_the_stock_modules_own():
    """Where no node pays, the file is that of the stock model, node for node."""
    model, x = model_of("efficientformerv2_s0"), make_image(1, 3, 224, 224)
    stock = [node.op_type for node in to_onnx(model, x, operators="standard").model.graph.node]
    effattn.accelerate(model)
    assert [node.op_type for node in to_onnx(model, x).model.graph.node] == stock
    assert to_onnx(model, x, operators=[ALL[0]]).nodes == {ALL[0]: 5}


def test_what_is_exported_shares_its_weights():
    """Of a model as large as memory, there is no second one."""
    from effattn.export import _prepared

    model = model_of("efficientvit_m0")
    shared = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    prepared = _prepared(model, frozenset(ALL))
    assert {t.data_ptr() for t in prepared.parameters()} <= shared
    new = [name for name, t in prepared.named_buffers() if t.data_ptr() not in shared]
    assert new and all(".frozen_" in name for name in new)


def test_a_model_in_training_mode_is_exported_for_inference():
    module = randomised(ours.LocalWindowAttention(32, 4, 2, 4, 10, 4, (3, 5)))
    x = torch.randn(2, 32, 10, 9)
    with torch.no_grad():
        right = module(x)
    module.train()
    assert_same(run(to_onnx(module, x).model, x), right)
    assert module.training and all(part.training for part in module.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["LiteMLA", "LocalWindowAttention"])
def test_other_dtypes_have_standard_operators(name, dtype):
    torch.manual_seed(0)
    make, shape, _, _ = MODULES[name]
    module, x = randomised(make()).to(dtype), torch.randn(shape).to(dtype)
    exported = to_onnx(module, x)
    assert not exported.nodes and f"nodes are float32's, its attention computes in {dtype}" in str(exported)
    if dtype == torch.float16:  # onnxruntime has no convolution in float64
        with torch.no_grad():
            assert_same(run(exported.model, x), module(x))


def test_autocast_around_an_export_is_no_part_of_it():
    torch.manual_seed(0)
    make, shape, _, node = MODULES["LocalWindowAttention"]
    module, x = randomised(make()), torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        exported = to_onnx(module, x)
    assert exported.nodes == {node: 1} and not any(n.op_type == "Cast" for n in exported.model.graph.node)
    with torch.no_grad():
        assert_same(run(exported.model, x), module(x))


def test_weights_that_are_computed():
    """By a hook of weight_norm, which leaves what cannot be copied."""
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 32, 1)), ours.LiteMLA(32, 32, dim=8))
    randomised(model)
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        right = model(x)
    assert_same(run(to_onnx(model, x).model, x), right)


def test_one_window_as_large_as_the_image_has_one_size():
    module = randomised(ours.CascadedGroupAttention(32, 4, 2, 4, 6, (3, 5)))
    with pytest.raises(Exception, match="leave height and width out of dynamic"):
        to_onnx(module, torch.randn(2, 32, 6, 7), dynamic=[{2: "height", 3: "width"}])


def test_several_threads_export():
    """In turn: torch's exporter is for one at a time."""
    module, x, found = randomised(ours.LiteMLA(16, 16, dim=8)), torch.randn(1, 16, 5, 5), []
    threads = [threading.Thread(target=lambda: found.append(to_onnx(module, x).nodes)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{ALL[2]: 1}] * 3


def test_why_there_are_no_nodes():
    x = torch.randn(1, 3)
    assert "no attention that effattn knows was recorded" in str(to_onnx(nn.ReLU(), x))
    assert "as asked for" in str(to_onnx(nn.ReLU(), x, operators="standard"))
    attention = randomised(timm.models.efficientformer.Attention(32, 8, 4, 4, 5))
    assert f"its attention is {ALL[0]}, whose nodes are no faster" in str(to_onnx(attention, torch.randn(1, 25, 32)))


def test_parts_with_hooks_are_called():
    """A cascade whose weights cannot be folded is exported part by part."""
    module = randomised(ours.CascadedGroupAttention(32, 4, 2, 4, 6, (3, 5)))
    module.qkvs[0].register_forward_hook(lambda part, inputs, out: 2 * out)
    x = torch.randn(2, 32, 6, 6)
    exported = to_onnx(module, x)
    assert not exported.nodes
    with torch.no_grad():
        assert_same(run(exported.model, x), module(x))


@pytest.mark.parametrize("operators", ["none", ["no_such_operator"], ["effattn"], ALL[0]])
def test_unknown_operators(operators):
    with pytest.raises(ValueError, match="operators: expected"):
        to_onnx(nn.ReLU(), torch.randn(2), operators=operators)


@pytest.mark.parametrize("dynamic", [{0: "batch"}, "batch", ["batch"], [{"batch": 0}], [{0: 1}]])
def test_dynamic_is_a_list_of_mappings(dynamic):
    with pytest.raises(TypeError, match=r"dynamic: expected a list with one entry for each input, .* got"):
        to_onnx(nn.ReLU(), torch.randn(2), dynamic=dynamic)


def test_wrong_arguments(tmp_path):
    x = torch.randn(2)
    with pytest.raises(ValueError, match=r"dynamic: expected a dimension of input 0, of shape \(2,\), got 1"):
        to_onnx(nn.ReLU(), x, dynamic=[{1: "a"}])
    with pytest.raises(ValueError, match="dynamic: expected one for each of 1 inputs, got 2"):
        to_onnx(nn.ReLU(), x, dynamic=[{0: "a"}, None])
    with pytest.raises(ValueError, match="input_names: expected one for each of 1 inputs, got 0"):
        to_onnx(nn.ReLU(), x, input_names=[])
    with pytest.raises(IsADirectoryError, match="expected a file, got the folder"):
        to_onnx(nn.ReLU(), x, tmp_path)
    for example in ({"x": x}, 3, [x.numpy()]):
        with pytest.raises(TypeError, match="example: expected a tensor or a sequence of tensors, got"):
            to_onnx(nn.ReLU(), example)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got builtin"):
        to_onnx(torch.relu, x)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        to_onnx(nn.ReLU(), x, tmp_path / "missing" / "model.onnx")


def test_a_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    to_onnx(nn.ReLU(), torch.randn(2), path)
    before = path.read_bytes()

    def fail(self, destination, **_):
        destination.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        to_onnx(nn.Sigmoid(), torch.randn(2), path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


# --- command line ---------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    path = tmp_path / "m0.onnx"
    main(["export", "efficientvit_m0", "-o", str(path), "--size", "96x64", "--dynamic", "batch,height,width"])
    assert f"{path}, with nodes of effattn: 6 {ALL[1]}" in capsys.readouterr().out
    (given,) = onnx.load(path).graph.input
    dims = given.type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]
    for shape in ((1, 3, 96, 64), (3, 3, 128, 224)):
        assert run(path, torch.randn(shape)).shape == (shape[0], 1000)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["no_such_model"], "Unknown model"),
        (["efficientvit_b0", "--operators", "none_such,standard"], "operators: expected"),
        (["efficientvit_b0", "-o", "/no/such/folder/model.onnx"], "there is no folder"),
        (["efficientvit_b0", "--checkpoint", "/no/such/file"], "/no/such/file"),
    ],
)
def test_command_line_errors(arguments, text):
    with pytest.raises(SystemExit, match=text):
        main(["export", *arguments])


def test_command_line_usage():
    done = subprocess.run(
        [sys.executable, "-m", "effattn", "export", "efficientvit_b0", "--size", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "expected rows and columns, as 224 or 1024x2048, got '0'" in done.stderr
