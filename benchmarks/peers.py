"""Ways to run a computation that others offer: torch.compile, onnxruntime, OpenVINO.

Each is given what it likes best: fixed shapes, frozen weights, inputs and outputs bound once without a
copy, every thread that torch has.
"""

from __future__ import annotations

import types
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


def onnxruntime_call(model: Any, inputs: Tensors, outputs: Tensors) -> Callable[[], Tensors]:
    """An ONNX model on onnxruntime's CPU provider; reads ``inputs`` and writes ``outputs`` in place."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
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


def openvino_call(model: Any, inputs: Tensors, outputs: Tensors, precision: str = "f32") -> Callable[[], Tensors]:
    """An ONNX model on OpenVINO's CPU device, for latency; reads ``inputs``, writes ``outputs`` in place."""
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings).create_infer_request()
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
