"""Exports to ONNX by either exporter, checks what comes, and runs it in onnxruntime."""

from __future__ import annotations

import contextlib
import io
import warnings

import onnx
import onnxruntime
import torch
from specified import AsModule


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
            shapes = (shapes,) if shapes and isinstance(model, AsModule) else shapes  # it takes *images
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
