"""Operators as nodes of an ONNX graph, in the domain "effattn": what the libraries for onnxruntime and OpenVINO run.

A node has the name of the operator. Its inputs are the operator's tensors, lists one tensor after the other; its
attributes are the operator's options, the length of each list under the list's name, and ``format``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effattn import _library

DOMAIN = "effattn"


def record(name: str, inputs: Sequence[torch.Tensor], shape: Sequence[Any], **attributes: float) -> torch.Tensor:
    """Puts a node into the graph that is being made.

    Args:
        name: of the operator.
        inputs: activations, then weights, which are taken in float32.
        shape: of the output, which has the dtype of the first input.
        attributes: floats as they are, others as integers.
    """
    out: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}",
        list(inputs),
        {**attributes, "format": _library.node_format()},
        dtype=inputs[0].dtype,
        shape=shape,
        version=1,
    )
    return out


def record_operator(name: str, signature: Any, arguments: Sequence[Any], shape: Sequence[Any]) -> torch.Tensor:
    """The node of a call of an operator, as its signature has it."""
    inputs: list[torch.Tensor] = []
    attributes: dict[str, float] = {}
    for argument, given in zip(signature.arguments, arguments, strict=True):
        if isinstance(given, torch.Tensor):
            inputs.append(given)
        elif argument.is_option and isinstance(given, torch.SymInt):
            raise ValueError(
                f"{name}: {argument.name}: a node has one size, and this is that of an image of any size: leave height "
                "and width out of dynamic"
            )
        elif argument.is_option:
            attributes[argument.name] = given if argument.kind == "integer" else float(given)
        else:
            inputs += given or ()
            attributes[argument.name] = len(given or ())
    return record(name, inputs, shape, **attributes)
