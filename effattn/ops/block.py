"""Blocks of networks in evaluation: short programs over the micro-kernels, with weights packed once for many calls.

A program is text, a line a value::

    %0 = image(channels=16)
    %1 = convolution(%0, channels=64, activation=hardswish)
    %2 = depthwise(%1, kernel=3, stride=2, activation=hardswish)
    %3 = convolution(%2, channels=32)

The last value is the result. Every line takes its weights from where the line before it ended.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from effattn.ops import multi_scale_linear_attention
from effattn.ops._operator import InferenceOperator
from effattn.ops._packed import CHANNELS, OUTPUTS, padded, rounded
from effattn.ops._plain import without_autocast

SCHEMA = "(Tensor x, Tensor[] weights, str program) -> Tensor"

#: In the order in which a line has them.
_OPTIONS = ("channels", "kernel", "stride", "padding", "groups", "activation", "residual", "head_dim", "eps")

#: By the names that programs have for them.
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Step(NamedTuple):
    """A line of a program.

    Args:
        operation: ``image``, ``convolution``, ``depthwise`` or ``linear_attention``.
        inputs: numbers of earlier values.
        channels: of the result.
        kernel, stride, padding, groups: of a convolution; square.
        activation: one of ACTIVATIONS.
        residual: the number of the value that is added behind the activation, or None.
        head_dim, eps: of an attention: inputs hold q, k and v of one head after the other, and there is one a scale.
    """

    operation: str
    inputs: tuple[int, ...]
    channels: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    activation: str = "none"
    residual: int | None = None
    head_dim: int = 0
    eps: float = 0.0

    def text(self, number: int) -> str:
        """As line ``number``."""
        given = [f"%{value}" for value in self.inputs]
        for name in _OPTIONS:
            value = getattr(self, name)
            if value == self._field_defaults.get(name) or (name == "padding" and value == self.kernel // 2):
                continue
            given.append(f"{name}=%{value}" if name == "residual" else f"{name}={value}")
        if self.padding == 0 and self.kernel > 1:
            given.append("padding=0")
        return f"%{number} = {self.operation}({', '.join(given)})"


@cache
def parse(program: str) -> tuple[Step, ...]:
    """The lines of a program's text, which csrc checks."""
    steps = []
    for line in program.splitlines():
        operation, arguments = re.fullmatch(r"%\d+ = (\w+)\((.*)\)", line).groups()  # type: ignore[union-attr]
        parts = arguments.split(", ")
        inputs = tuple(int(part[1:]) for part in parts if part.startswith("%"))
        options: dict[str, Any] = dict(part.split("=") for part in parts if "=" in part)
        options = {name: _value(name, text) for name, text in options.items()}
        options.setdefault("padding", options.get("kernel", 1) // 2)
        steps.append(Step(operation, inputs, options.pop("channels"), **options))
    return tuple(steps)


def _value(name: str, text: str) -> Any:
    if name == "activation":
        return text
    return float(text) if name == "eps" else int(text.removeprefix("%"))


class Block(NamedTuple):
    """A program and its weights, float32 (n,)."""

    weights: torch.Tensor
    program: str


class Builder:
    """Makes a program, step by step, of weights of any dtype.

    Methods return the number of the value that they make. Weights are those of torch's convolutions.
    """

    def __init__(self, channels: int) -> None:
        self._steps = [Step("image", (), channels)]
        self._weights: list[torch.Tensor] = []

    def channels(self, value: int) -> int:
        return self._steps[value].channels

    def convolution(
        self,
        value: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        activation: str = "none",
    ) -> int:
        """weight (C_out, C / groups, k, k), bias (C_out,): of one group, of groups of as many outputs as inputs that
        are a multiple of CHANNELS, or depthwise."""
        outputs, _, kernel, _ = weight.shape
        inputs = self.channels(value)
        bias = weight.new_zeros(outputs) if bias is None else bias
        is_depthwise = groups == inputs == outputs and groups > 1
        pack = _pack_depthwise if is_depthwise else lambda *of: _pack_convolution(*of, groups)
        self._weights += (t.detach().float().flatten() for t in pack(weight, bias))
        return self._add(
            Step(
                "depthwise" if is_depthwise else "convolution",
                (value,),
                outputs,
                kernel,
                stride,
                kernel // 2 if padding is None else padding,
                1 if is_depthwise else groups,
                activation,
            )
        )

    def linear_attention(self, values: Sequence[int], *, head_dim: int, eps: float) -> int:
        """ReLU linear attention of every head: of values with q, k and v of each in turn, ``head_dim`` channels each,
        a multiple of CHANNELS. The heads of one value come behind those of the other."""
        channels = len(values) * self.channels(values[0]) // 3
        return self._add(Step("linear_attention", tuple(values), channels, head_dim=head_dim, eps=eps))

    def add(self, value: int, residual: int) -> int | None:
        """The value plus another; None where that cannot be put into the step that makes the value."""
        step = self._steps[value]
        is_last = value == len(self._steps) - 1
        if not is_last or step.operation not in ("convolution", "depthwise") or step.residual is not None:
            return None
        self._steps[value] = step._replace(residual=residual)
        return value

    def finish(self) -> Block:
        """The program whose result is the last value."""
        lines = (step.text(number) for number, step in enumerate(self._steps))
        return Block(torch.cat(self._weights), "\n".join(lines))

    def _add(self, step: Step) -> int:
        self._steps.append(step)
        return len(self._steps) - 1


def _pack_convolution(weight: torch.Tensor, bias: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(groups, panels, inputs and taps, OUTPUTS): of every block of CHANNELS inputs its taps, of every tap its inputs;
    and (groups, panels, OUTPUTS)."""
    outputs, inputs, kernel, _ = weight.shape
    whole = rounded(outputs // groups, OUTPUTS)
    by_panel = padded(weight.reshape(groups, -1, inputs, kernel * kernel), 1, whole)
    by_panel = by_panel.unflatten(1, (-1, OUTPUTS))  # groups, panels, OUTPUTS, inputs, taps
    blocks = [block.permute(0, 1, 4, 3, 2).flatten(2, 3) for block in by_panel.split(CHANNELS, dim=3)]
    return torch.cat(blocks, dim=2), padded(bias.reshape(groups, -1), 1, whole)


def _unpack_convolution(
    packed: torch.Tensor, bias: torch.Tensor, step: Step, inputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, outputs, taps = step.groups, step.channels // step.groups, step.kernel**2
    rows = packed.reshape(groups, -1, inputs // groups * taps, OUTPUTS)
    blocks = [
        block.unflatten(2, (taps, -1)).permute(0, 1, 4, 3, 2) for block in rows.split(CHANNELS * taps, dim=2)
    ]
    weight = torch.cat(blocks, dim=3).flatten(1, 2)[:, :outputs].flatten(0, 1)
    return weight.unflatten(-1, (step.kernel, step.kernel)), bias.reshape(groups, -1)[:, :outputs].flatten()


def _pack_depthwise(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, taps, CHANNELS) and (blocks, CHANNELS)."""
    whole = rounded(len(weight))
    blocks = padded(weight.flatten(1), 0, whole).unflatten(0, (-1, CHANNELS))
    return blocks.transpose(1, 2), padded(bias, 0, whole)


def _unpack_depthwise(packed: torch.Tensor, bias: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = packed.reshape(-1, step.kernel**2, CHANNELS).transpose(1, 2).flatten(0, 1)
    return blocks[: step.channels].unflatten(1, (1, step.kernel, step.kernel)), bias[: step.channels]


def _sizes_of_weights(step: Step, inputs: int) -> tuple[int, int]:
    """Elements of the packed weight and bias."""
    taps = step.kernel**2
    if step.operation == "depthwise":
        return rounded(step.channels) * taps, rounded(step.channels)
    if step.operation != "convolution":
        return 0, 0
    outputs = step.groups * rounded(step.channels // step.groups, OUTPUTS)
    return outputs * (inputs // step.groups) * taps, outputs


def block(x: torch.Tensor, of: Block) -> torch.Tensor:
    """(B, C, H, W) -> (B, C_out, H', W'), of x's memory format."""
    return OPERATOR(x, [of.weights], of.program)


def plain(x: torch.Tensor, weights: Sequence[torch.Tensor], program: str) -> torch.Tensor:
    values = [x.to(torch.promote_types(x.dtype, torch.float32))]
    steps = parse(program)
    at = 0
    with without_autocast(x.device):
        for step in steps[1:]:
            inputs = [values[number] for number in step.inputs]
            sizes = _sizes_of_weights(step, steps[step.inputs[0]].channels)
            weight, bias = weights[0][at : at + sum(sizes)].to(values[0].dtype).split(sizes)
            at += sum(sizes)
            values.append(_plain_step(step, inputs, weight, bias))
            if step.residual is not None:
                values[-1] = values[-1] + values[step.residual]
    return values[-1].to(x.dtype)


def _plain_step(step: Step, inputs: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if step.operation == "linear_attention":
        joined = torch.cat(list(inputs), dim=1)
        return multi_scale_linear_attention.plain(joined, [], [], [], [], step.head_dim, step.eps)
    x = inputs[0]
    if step.operation == "depthwise":
        weight, bias = _unpack_depthwise(weight, bias, step)
        groups = step.channels
    else:
        weight, bias = _unpack_convolution(weight, bias, step, x.shape[1])
        groups = step.groups
    out = functional.conv2d(x, weight, bias, step.stride, step.padding, groups=groups)
    return ACTIVATIONS[step.activation](out)


def _shape(x: torch.Tensor, weights: Sequence[torch.Tensor], program: str) -> tuple[int, ...]:
    sizes = [x.shape[2:]]
    steps = parse(program)
    for step in steps[1:]:
        before = sizes[step.inputs[0]]
        sizes.append(tuple((n + 2 * step.padding - step.kernel) // step.stride + 1 for n in before))
    return (x.shape[0], steps[-1].channels, *sizes[-1])


OPERATOR = InferenceOperator("block", plain, _shape)
serves = OPERATOR.serves
