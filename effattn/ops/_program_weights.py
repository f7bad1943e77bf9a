"""Weights of the steps of a program, in the order in which micro-kernels read them (kernels/cpu/block/program.h)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from effattn.ops._packed import CHANNELS, OUTPUTS, joined, padded, rounded
from effattn.ops._program import Step, parse

Tensors = Sequence[torch.Tensor]


def pack(step: Step, weights: Tensors) -> list[torch.Tensor]:
    """A step's weights one behind the other, each flat.

    Args:
        weights:

            - of a convolution, depthwise or not: weight (C_out, C / groups, k, k), bias (C_out,);
            - of a pool mixer: factor (C,); of a norm: gain (C,), bias (C,);
            - of an attention: bias (heads, queries, keys), and with talking heads the four tensors of their mixing;
            - of a cascade: weights (heads, 2 head_dim + C / heads, C / heads) and biases of the projections, taps
              (head_dim, 1, k, k) of each head, biases (heads, head_dim) of the depthwise convolutions, bias
              (heads, N, N).
    """
    if step.operation == "convolution":
        packed = _pack_convolution(step, *weights)
    elif step.operation == "depthwise":
        packed = _pack_depthwise(*weights)
    elif step.operation == "cascade":
        packed = _pack_cascade(step, *weights)
    elif step.operation == "attention":
        packed = tuple(weights)
    else:
        packed = tuple(padded(t, 0, rounded(len(t))) for t in weights)
    return [t.detach().float().flatten() for t in packed]


def unpack(step: Step, inputs: int, weights: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """What :func:`pack` was given, of the weights from this step on; and how many they are.

    Args:
        inputs: channels of the first input.
    """
    shapes = _shapes(step, inputs)
    sizes = [math.prod(shape) for shape in shapes]
    tensors = [t.reshape(shape) for t, shape in zip(weights[: sum(sizes)].split(sizes), shapes, strict=True)]
    if step.operation == "convolution":
        tensors = _unpack_convolution(step, *tensors)
    elif step.operation == "depthwise":
        tensors = _unpack_depthwise(step, *tensors)
    elif step.operation == "cascade":
        tensors = _unpack_cascade(step, *tensors)
    elif step.operation != "attention":
        tensors = [t[: step.channels] for t in tensors]
    return tensors, sum(sizes)


def size_of_weights(program: str) -> int:
    """Elements of the weights of all steps."""
    steps = parse(program)
    shapes = (shape for step in steps[1:] for shape in _shapes(step, steps[step.inputs[0]].channels))
    return sum(map(math.prod, shapes))


def _shapes(step: Step, inputs: int) -> list[tuple[int, ...]]:
    """Of what :func:`pack` makes."""
    taps = step.kernel**2
    if step.operation == "convolution":
        panels = rounded(step.channels // step.groups, OUTPUTS) // OUTPUTS
        return [(step.groups, panels, inputs // step.groups * taps, OUTPUTS), (step.groups, panels * OUTPUTS)]
    whole = rounded(step.channels)
    if step.operation == "depthwise":
        return [(whole // CHANNELS, taps, CHANNELS), (whole,)]
    if step.operation == "pool_mixer":
        return [(whole,)]
    if step.operation == "layer_norm":
        return [(whole,), (whole,)]
    if step.operation == "attention":
        heads = step.heads
        mix: list[tuple[int, ...]] = [(heads, heads), (heads,)] * (2 * step.talking_heads)
        return [(heads, step.queries, step.keys), *mix]
    if step.operation == "cascade":
        heads, keys, value_dim = len(step.kernels), rounded(step.head_dim), inputs // len(step.kernels)
        outputs, tokens = 2 * keys + rounded(value_dim), math.prod(step.window)
        all_taps = sum(kernel**2 for kernel in step.kernels)
        return [(heads, value_dim, outputs), (heads, outputs), (all_taps, keys), (heads, keys), (heads, tokens, tokens)]
    return []


def _pack_convolution(step: Step, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(groups, panels, inputs and taps, OUTPUTS): of every block of CHANNELS inputs its taps, of every tap its inputs;
    and (groups, panels, OUTPUTS)."""
    groups, (outputs, inputs, kernel, _) = step.groups, weight.shape
    whole = rounded(outputs // groups, OUTPUTS)
    by_panel = padded(weight.reshape(groups, -1, inputs, kernel * kernel), 1, whole)
    by_panel = by_panel.unflatten(1, (-1, OUTPUTS))  # groups, panels, OUTPUTS, inputs, taps
    blocks = [block.permute(0, 1, 4, 3, 2).flatten(2, 3) for block in by_panel.split(CHANNELS, dim=3)]
    return torch.cat(blocks, dim=2), padded(bias.reshape(groups, -1), 1, whole)


def _unpack_convolution(step: Step, rows: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    outputs, taps = step.channels // step.groups, step.kernel**2
    blocks = [block.unflatten(2, (taps, -1)).permute(0, 1, 4, 3, 2) for block in rows.split(CHANNELS * taps, dim=2)]
    weight = torch.cat(blocks, dim=3).flatten(1, 2)[:, :outputs].flatten(0, 1)
    return [weight.unflatten(-1, (step.kernel, step.kernel)), bias[:, :outputs].flatten()]


def _pack_depthwise(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(blocks, taps, CHANNELS) and (blocks, CHANNELS)."""
    whole = rounded(len(weight))
    blocks = padded(weight.flatten(1), 0, whole).unflatten(0, (-1, CHANNELS))
    return blocks.transpose(1, 2), padded(bias, 0, whole)


def _unpack_depthwise(step: Step, blocks: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    weight = blocks.transpose(1, 2).flatten(0, 1)[: step.channels]
    return [weight.unflatten(1, (1, step.kernel, step.kernel)), bias[: step.channels]]


def _pack_cascade(
    step: Step, qkv: torch.Tensor, qkv_bias: torch.Tensor, *rest: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(heads, C / heads, q | k | v), each of q, k and v a multiple of CHANNELS, (heads, q | k | v), (taps of all heads,
    q), (heads, q) and the bias."""
    *taps, tap_bias, bias = rest
    keys, value_dim = rounded(step.head_dim), qkv.shape[2]
    dims, sizes = [step.head_dim, step.head_dim, value_dim], [keys, keys, rounded(value_dim)]
    return (
        torch.stack([joined(weight.split(dims), sizes).mT for weight in qkv]),
        torch.stack([joined(of.split(dims), sizes) for of in qkv_bias]),
        torch.cat([padded(of.flatten(1), 0, keys).mT for of in taps]),
        padded(tap_bias, 1, keys),
        bias,
    )


def _unpack_cascade(step: Step, *weights: torch.Tensor) -> list[torch.Tensor]:
    qkv, qkv_bias, taps, tap_bias, bias = weights
    keys, dim, value_dim = rounded(step.head_dim), step.head_dim, qkv.shape[1]
    parts = [slice(0, dim), slice(keys, keys + dim), slice(2 * keys, 2 * keys + value_dim)]
    of_heads = zip(taps.split([kernel**2 for kernel in step.kernels]), step.kernels, strict=True)
    return [
        torch.cat([qkv.mT[:, part] for part in parts], dim=1),
        torch.cat([qkv_bias[:, part] for part in parts], dim=1),
        *(of.mT[:dim].reshape(dim, 1, kernel, kernel) for of, kernel in of_heads),
        tap_bias[:, :dim],
        bias,
    ]
