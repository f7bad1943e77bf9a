"""Programs of :mod:`effattn.ops.block`: their text, and what it says of sizes.

A program is text, a line a value::

    %0 = image(channels=16)
    %1 = convolution(%0, channels=64, activation=hardswish)
    %2 = depthwise(%1, channels=64, kernel=3, stride=2, activation=hardswish)
    %3 = convolution(%2, channels=32)

The last value is the result. Every line takes its weights from where those of the line before ended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

#: That are remembered; as many as csrc keeps.
MAX_PROGRAMS = 256
#: What a line without an option means; those that are None must be given where they are read.
DEFAULTS: dict[str, Any] = {
    "channels": None,
    "kernel": 1,
    "stride": 1,
    "padding": None,  # half of the kernel
    "groups": 1,
    "activation": "none",
    "residual": None,
    "addend": None,
    "eps": None,
    "heads": None,
    "head_dim": None,
    "value_dim": None,
    "queries": None,
    "keys": None,
    "scale": None,
    "talking_heads": 0,
    "kernels": None,
    "window": None,
}
_VALUES, _LISTS, _REALS = ("residual", "addend"), ("kernels", "window"), ("eps", "scale")


class Step(NamedTuple):
    """A line of a program.

    Args:
        operation: ``image``, and

            - ``convolution``: dense, or of ``groups`` of as many outputs as inputs; square, as is
            - ``depthwise``;
            - ``pool_mixer``: x + factor (mean of the ``kernel`` x ``kernel`` pixels around - x), EfficientFormer's;
            - ``layer_norm``: over the channels of each pixel;
            - ``mean``: of the image, which leaves one pixel, and ``multiply``: by one pixel;
            - ``upsample``: bilinearly, by two;
            - ``linear_attention``: of ReLU, of inputs with q, k and v of each head in turn, an input a scale;
            - ``attention``: softmax with a bias; inputs have q of all heads, then their k, then their v: all in one,
              v apart, or each apart;
            - ``cascade``: cascaded group attention.
        inputs: numbers of earlier values.
        options: of DEFAULTS. ``residual`` is a value that is added behind the activation, ``addend`` one that is added
            in front of it.
    """

    operation: str
    inputs: tuple[int, ...]
    options: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name == "padding":
            return self.options.get(name, self.kernel // 2)
        try:
            return self.options[name] if name in self.options else DEFAULTS[name]
        except KeyError:
            raise AttributeError(name) from None

    def text(self, number: int) -> str:
        """As line ``number``."""
        given = [f"%{value}" for value in self.inputs]
        given += (f"{name}={_text(name, self.options[name])}" for name in DEFAULTS if self._says(name))
        return f"%{number} = {self.operation}({', '.join(given)})"

    def _says(self, name: str) -> bool:
        default = self.kernel // 2 if name == "padding" else DEFAULTS[name]
        return name in self.options and self.options[name] != default


def _text(name: str, value: Any) -> str:
    if name in _LISTS:
        return "x".join(map(str, value))
    return f"%{value}" if name in _VALUES else str(value)


def _value(name: str, text: str) -> Any:
    if name == "activation":
        return text
    if name in _LISTS:
        return tuple(map(int, text.split("x")))
    return float(text) if name in _REALS else int(text.removeprefix("%"))


@lru_cache(MAX_PROGRAMS)
def parse(program: str) -> tuple[Step, ...]:
    """The lines of a program's text, which csrc checks."""
    steps = []
    for line in program.splitlines():
        found = re.fullmatch(r"%\d+ = (\w+)\((.*)\)", line)
        if found is None:
            raise ValueError(f"program: expected %number = operation(...), got {line!r}")
        operation, arguments = found.groups()
        parts = arguments.split(", ")
        inputs = tuple(int(part[1:]) for part in parts if part.startswith("%"))
        options = dict(part.split("=") for part in parts if "=" in part)
        steps.append(Step(operation, inputs, {name: _value(name, text) for name, text in options.items()}))
    return tuple(steps)


def sizes(steps: Sequence[Step], height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of every value, of an image of these."""
    found = [(height, width)]
    for step in steps[1:]:
        before = found[step.inputs[0]]
        if step.operation == "mean":
            before = (1, 1)
        elif step.operation == "upsample":
            before = (2 * before[0], 2 * before[1])
        elif step.operation in ("convolution", "depthwise"):
            kernel, stride, padding = step.kernel, step.stride, step.padding
            before = tuple((n + 2 * padding - kernel) // stride + 1 for n in before)
        found.append(before)
    return found


@lru_cache(4 * MAX_PROGRAMS)
def takes(program: str, channels: int, height: int, width: int) -> bool:
    """Whether a program takes an image of a size: an attention's bias is for one number of tokens."""
    steps = parse(program)
    if channels != steps[0].channels:
        return False
    found = sizes(steps, height, width)

    def tokens(value: int) -> int:
        return found[value][0] * found[value][1]

    return (
        min(map(min, found)) > 0
        and all(
            (tokens(step.inputs[0]), tokens(step.inputs[-1])) == (step.queries, step.keys)
            and (step.addend is None or found[step.addend] == found[number])
            for number, step in enumerate(steps)
            if step.operation == "attention"
        )
        and all(step.residual is None or found[step.residual] == found[number] for number, step in enumerate(steps))
    )
