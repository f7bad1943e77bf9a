"""Makes programs of :mod:`effattn.ops.block`, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effattn.ops._program import Step
from effattn.ops._program_weights import pack
from effattn.ops.block import Block

_CONVOLUTIONS = ("convolution", "depthwise")


class Builder:
    """A program in the making, of weights of any dtype.

    Methods return the number of the value that they make. Of attentions, every head's q, k and v have a multiple of
    CHANNELS channels, zeros behind the last.

    Args:
        channels: of the image.
    """

    def __init__(self, channels: int) -> None:
        self._steps = [Step("image", (), {"channels": channels})]
        self._weights: list[Sequence[torch.Tensor]] = [()]

    def channels(self, value: int) -> int:
        found: int = self._steps[value].channels
        return found

    def step(self, operation: str, inputs: Sequence[int], weights: Sequence[torch.Tensor] = (), **options: Any) -> int:
        """Any step; ``weights`` as :func:`effattn.ops._program_weights.pack` takes them."""
        options.setdefault("channels", self.channels(inputs[0]))
        self._steps.append(Step(operation, tuple(inputs), options))
        self._weights.append(weights)
        return len(self._steps) - 1

    def convolution(
        self, value: int, weight: torch.Tensor, bias: torch.Tensor | None, *, groups: int = 1, **options: Any
    ) -> int:
        """weight (C_out, C / groups, k, k), bias (C_out,): of one group, of groups of as many outputs as inputs that
        are a multiple of CHANNELS, or depthwise."""
        outputs, _, kernel, _ = weight.shape
        bias = weight.new_zeros(outputs) if bias is None else bias
        is_depthwise = groups == self.channels(value) == outputs and groups > 1
        return self.step(
            "depthwise" if is_depthwise else "convolution",
            (value,),
            (weight, bias),
            channels=outputs,
            kernel=kernel,
            groups=1 if is_depthwise else groups,
            **options,
        )

    def activate(self, value: int, activation: str) -> bool:
        """An activation of a value that nothing has read; False where the step that makes it has none."""
        step = self._last(value)
        if step is None or step.residual is not None or step.activation != "none":
            return activation == "none"
        if step.operation not in (*_CONVOLUTIONS, "attention", "cascade", "upsample"):
            return activation == "none"
        return self._change(value, activation=activation)

    def scale(self, value: int, factor: torch.Tensor) -> bool:
        """A factor a channel of a value that nothing has read; False where the step that makes it takes none."""
        step = self._last(value)
        if step is None or step.operation not in _CONVOLUTIONS or step.activation != "none":
            return False
        if step.residual is not None:
            return False
        weight, bias = self._weights[value]
        self._weights[value] = (weight * factor.reshape(-1, 1, 1, 1), bias * factor)
        return True

    def add(self, value: int, residual: int) -> bool:
        """Another value to one that nothing has read; False where the step that makes it takes none."""
        step = self._last(value)
        if step is None or step.operation not in _CONVOLUTIONS or step.residual is not None:
            return False
        return self._change(value, residual=residual)

    def finish(self, *, with_weights: bool = True) -> Block:
        """The program whose result is the last value; without weights where only its text is asked for."""
        lines = (step.text(number) for number, step in enumerate(self._steps))
        if not with_weights:
            return Block(torch.zeros(0), "\n".join(lines))
        weights = [t for step, of in zip(self._steps, self._weights, strict=True) if of for t in pack(step, of)]
        return Block(torch.cat(weights) if weights else torch.zeros(0), "\n".join(lines))

    def _last(self, value: int) -> Step | None:
        return self._steps[value] if value == len(self._steps) - 1 else None

    def _change(self, value: int, **options: Any) -> bool:
        step = self._steps[value]
        self._steps[value] = step._replace(options={**step.options, **options})
        return True
