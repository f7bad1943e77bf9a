"""One node of effattn as a whole ONNX model, in onnxruntime and in OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from nodes import attributes_of
from onnx import TensorProto, helper, numpy_helper
from specified import flattened

import effattn
from effattn import _library
from effattn.ops._operator import Operator

Run = Callable[..., torch.Tensor]


def node_model(
    operator: Operator,
    arguments: Sequence[Any],
    *,
    changed: Mapping[str, Any] | None = None,
    constant: bool = True,
    sizes: Sequence[Sequence[Any] | None] | None = None,
    out: Sequence[Any] | None = None,
) -> bytes:
    """A graph of one node.

    Args:
        operator: of the node.
        arguments: of the call that it stands for.
        changed: attributes that are not as they should be; None leaves one out.
        constant: whether weights are initializers; else they are inputs too.
        sizes: of each activation, in place of sizes that are all free; None of one whose rank is unknown too.
        out: those of the output.
    """
    count = operator.signature.num_activations
    tensors = flattened(arguments)
    names = [f"x{i}" for i in range(len(tensors))]
    attributes = {"format": _library.node_format(), **attributes_of(operator, arguments), **(changed or {})}
    node = helper.make_node(
        operator.name,
        names,
        ["out"],
        domain="effattn",
        **{name: value for name, value in attributes.items() if value is not None},
    )
    free = len(tensors) if not constant else count
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes[i] if sizes and i < count else [None] * t.dim())
        for i, (name, t) in enumerate(zip(names[:free], tensors, strict=False))
    ]
    weights = [numpy_helper.from_array(t.numpy(), name) for name, t in zip(names[free:], tensors[free:], strict=True)]
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, out or [None] * tensors[0].dim())
    graph = helper.make_graph([node], "one node", inputs, [result], weights)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("effattn", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()


def in_onnxruntime(model: bytes, threads: int = 1, **settings: Any) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    for name, value in settings.items():
        setattr(options, name, value)
    session = effattn.onnxruntime.session(model, options)
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        feed = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def in_openvino(model: Any, threads: int = 2, precision: str = "f32", core: Any = None) -> Run:
    """With one thread, OpenVINO 2026.4 drops the errors of a call, its own operations' too, and returns nothing."""
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = effattn.openvino.compile(model, config=config, core=core)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        feed = {f"x{i}": np.ascontiguousarray(t.numpy()) for i, t in enumerate(tensors)}
        return torch.from_numpy(np.array(compiled(feed)[0]))

    return run


ENGINES: dict[str, Callable[..., Run]] = {"onnxruntime": in_onnxruntime, "OpenVINO": in_openvino}
#: What each engine raises.
ERRORS = {
    "onnxruntime": tuple(
        error
        for error in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
        if isinstance(error, type) and issubclass(error, Exception)
    ),
    "OpenVINO": (RuntimeError,),
}
