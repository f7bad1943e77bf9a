"""Ways to run a computation that others offer: torch.compile, onnxruntime, OpenVINO, TFLite, ExecuTorch.

Each is given what it likes best: fixed shapes, frozen weights, inputs and outputs bound once without a
copy, every thread that torch has.
"""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def compiled(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    """torch.compile of a function for one set of shapes."""
    # Dynamo keeps what it compiled with the code object: a copy of it makes every candidate its own first
    # entry, with no guards of others to fail before and no limit on recompilations to share.
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False, mode=mode)


def compiled_module(module: torch.nn.Module, x: torch.Tensor) -> Any:
    """torch.compile for one set of shapes; for inference (without gradients) with frozen weights.

    Freezing is decided while the graph is recorded, by the global setting: as an option of torch.compile it comes too
    late and does nothing, as of torch 2.13. Hence the first call is made here.
    """
    import torch._inductor.config as inductor

    made = torch.compile(module, fullgraph=True, dynamic=False)
    if not torch.is_grad_enabled():
        with inductor.patch(freezing=True):
            made(x)
    return made


def onnxruntime_session(model: bytes, library: str | None = None) -> Any:
    """A session on onnxruntime's CPU provider, with a library of custom operators."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def onnxruntime_call(
    model: Any, inputs: Tensors, outputs: Tensors, library: str | None = None
) -> Callable[[], Tensors]:
    """An ONNX model on onnxruntime's CPU provider; reads ``inputs`` and writes ``outputs`` in place."""
    session = onnxruntime_session(model.SerializeToString(), library)
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            _must_be_dense(name, tensor)
            bind(name, "cpu", 0, _onnx_type(tensor.dtype), tuple(tensor.shape), tensor.data_ptr())

    def call() -> Tensors:
        session.run_with_iobinding(binding)
        return outputs

    call.tensors = inputs, outputs  # type: ignore[attr-defined]  # the binding holds addresses only
    return call


def openvino_request(model: bytes, precision: str = "f32", library: str | None = None) -> Any:
    """A request of an ONNX model compiled for OpenVINO's CPU device and latency, with a library of extensions."""
    import openvino

    core = openvino.Core()
    if library is not None:
        core.add_extension(library)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()


def openvino_call(
    model: Any, inputs: Tensors, outputs: Tensors, precision: str = "f32", library: str | None = None
) -> Callable[[], Tensors]:
    """An ONNX model on OpenVINO's CPU device, for latency; reads ``inputs``, writes ``outputs`` in place."""
    import openvino

    request = openvino_request(model.SerializeToString(), precision, library)
    kinds = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16, torch.float16: openvino.Type.f16}
    for tensors in (inputs, outputs):
        for name, tensor in tensors.items():
            _must_be_dense(name, tensor)
            # numpy has no bfloat16: OpenVINO takes the bits under any type of their size.
            values = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
            request.set_tensor(name, openvino.Tensor(values, openvino.Shape(list(tensor.shape)), kinds[tensor.dtype]))

    def call() -> Tensors:
        request.infer(share_outputs=True)
        return outputs

    call.tensors = inputs, outputs  # type: ignore[attr-defined]  # must outlive the request
    return call


def tflite_call(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
    """A module, in evaluation, converted by litert-torch, on TFLite's interpreter with XNNPACK, its default delegate.

    An input in channels_last becomes a model of NHWC images, in and out, which is TFLite's own order. Inputs lie in the
    interpreter's tensors from the start. The result is a view of its output: it refuses to run while that is in use.
    """
    from ai_edge_litert.interpreter import Interpreter

    os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")
    import litert_torch

    (out,) = _outputs(module, inputs)
    nhwc = [i for i, x in enumerate(inputs) if not x.is_contiguous() and x.dim() == 4]
    if nhwc:
        module = litert_torch.to_channel_last_io(module, args=nhwc, outputs=[0] if out.dim() == 4 else []).eval()
        inputs = tuple(x.permute(0, 2, 3, 1) if i in nhwc else x for i, x in enumerate(inputs))
    for i, x in enumerate(inputs):
        _must_be_dense(f"input {i}", x)
    with _without_warnings():
        content = litert_torch.convert(module, inputs).model_content()
    interpreter = Interpreter(model_content=content, num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    signature = interpreter.get_signature_runner()
    places = signature.get_input_details()
    for i, x in enumerate(inputs):
        interpreter.tensor(places[f"args_{i}"]["index"])()[...] = x.numpy()
    (result,) = signature.get_output_details().values()
    view = interpreter.tensor(result["index"])
    swap = bool(nhwc) and out.dim() == 4

    def call() -> torch.Tensor:
        interpreter.invoke()
        found = torch.from_numpy(view())
        return found.permute(0, 3, 1, 2) if swap else found

    return call


def executorch_call(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
    """A module, in evaluation, on ExecuTorch, what XNNPACK takes delegated to it; reads ``inputs`` where they are.

    Inputs are contiguous: as of 1.5, channels_last ones save XNNPACK nothing, and whole models fail to lower. The
    result is a view of the program's memory, which the next call writes.
    """
    with _without_warnings():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass
        from executorch.extension.pybindings import portable_lib

        _outputs(module, inputs)
        exported = torch.export.export(module, inputs)
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        # No memory planned for inputs: the program gets their addresses.
        planning = MemoryPlanningPass(alloc_graph_input=False)
        buffer = lowered.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer
    if portable_lib._threadpool_get_thread_count() != torch.get_num_threads():
        portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
    program = portable_lib._load_program_from_buffer(buffer)
    method = program.load_method("forward")
    method.set_inputs(inputs)

    def call() -> torch.Tensor:
        method.execute()
        (out,) = method.get_outputs(clone_outputs=False)
        return out

    call.keeps = inputs, buffer, program  # type: ignore[attr-defined]  # the method holds addresses only
    return call


def _without_warnings() -> warnings.catch_warnings:
    """Of exporters: about deprecations inside of them, by the hundred."""
    return warnings.catch_warnings(action="ignore")


def _outputs(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What the module returns. Called once before an export, a lazily made buffer is no change that it would refuse."""
    with torch.no_grad():
        out = module(*inputs)
    return out if isinstance(out, tuple) else (out,)


def _must_be_dense(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: only a contiguous tensor can be bound without a copy")


def _onnx_type(dtype: torch.dtype) -> int:
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.float16: TensorProto.FLOAT16,
    }[dtype]
