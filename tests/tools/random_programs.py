"""Programs of any steps in any order, for fuzzing."""

from __future__ import annotations

import random

import torch

from effattn.nn.programs.builder import Builder
from effattn.ops.block import ACTIVATIONS, Block

CHANNELS = (1, 3, 8, 16, 24, 33, 64)
OUTPUTS = (1, 5, 16, 20, 32, 48, 70, 130)


def random_program(seed: int) -> tuple[Block, torch.Tensor]:
    """A program, and an image that may be too small for it."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        """Of a size that keeps activations where they are."""
        inputs = max(1, torch.Size(shape[1:]).numel())
        return torch.randn(*shape, generator=generator) / inputs**0.5

    channels = chance.choice(CHANNELS)
    b, values = Builder(channels), [0]
    for _ in range(chance.randint(1, 7)):
        values.append(_add_step(b, chance, weight, values[-1] if chance.random() < 0.8 else chance.choice(values)))
        if chance.random() < 0.4:
            others = [v for v in values[:-1] if b.channels(v) == b.channels(values[-1])]
            if others:
                b.add(values[-1], chance.choice(others))
    size = chance.choice((1, 2, 3, 7, 14, 15, 28, 33, 70)), chance.choice((1, 2, 5, 7, 14, 17, 28, 57, 90))
    x = torch.randn(chance.choice((1, 1, 2, 5)), channels, *size, generator=generator)
    return b.finish(), x.contiguous(memory_format=chance.choice((torch.contiguous_format, torch.channels_last)))


def _add_step(b: Builder, chance: random.Random, weight, value: int) -> int:
    inputs, kind = b.channels(value), chance.random()
    options = {"stride": chance.choice((1, 1, 1, 2)), "activation": chance.choice(list(ACTIVATIONS))}
    if kind < 0.45:
        kernel = chance.choice((1, 1, 1, 2, 3, 3, 5, 7))
        return b.convolution(value, weight(chance.choice(OUTPUTS), inputs, kernel, kernel), None, **options)
    if kind < 0.75 and inputs > 1:
        kernel = chance.choice((3, 4, 5, 7, 9))
        return b.convolution(value, weight(inputs, 1, kernel, kernel), weight(inputs), groups=inputs, **options)
    if kind < 0.8 and inputs % 16 == 0 and inputs > 16:
        return b.convolution(value, weight(inputs, 16, 1, 1), weight(inputs), groups=inputs // 16)
    if kind < 0.85:
        return b.step("pool_mixer", (value,), (weight(inputs),), kernel=chance.choice((3, 5)))
    if kind < 0.9:
        return b.step("layer_norm", (value,), (weight(inputs), weight(inputs)), eps=1e-3)
    if kind < 0.93:
        return b.step("multiply", (value, b.step("mean", (value,))))
    if kind < 0.96:
        return b.step("upsample", (value,), activation=options["activation"])
    qkv = b.convolution(value, weight(96, inputs, 1, 1), None)
    return b.step("linear_attention", (qkv,), channels=32, head_dim=16, eps=1e-2)
