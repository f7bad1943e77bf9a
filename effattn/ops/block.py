"""Blocks of networks in evaluation: programs (:mod:`effattn.ops._program`), with weights packed once for many calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from effattn.backends._memory import empty_image_in_order_of
from effattn.ops import biased_attention, cascaded_group_attention, multi_scale_linear_attention
from effattn.ops._operator import InferenceOperator
from effattn.ops._packed import of_heads, rounded
from effattn.ops._plain import without_autocast
from effattn.ops._program import Step, parse, sizes, takes
from effattn.ops._program_weights import unpack

SCHEMA = "(Tensor x, Tensor[] weights, str program) -> Tensor"

#: By the names that programs have for them.
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


class Block(NamedTuple):
    """A program and its weights, float32 (n,)."""

    weights: torch.Tensor
    program: str


def block(x: torch.Tensor, of: Block) -> torch.Tensor:
    """(B, C, H, W) -> (B, C_out, H', W'), of x's memory format."""
    return OPERATOR(x, [of.weights], of.program)


def plain(x: torch.Tensor, weights: Sequence[torch.Tensor], program: str) -> torch.Tensor:
    values = [x.to(torch.promote_types(x.dtype, torch.float32))]
    steps = parse(program)
    rest = weights[0]
    with without_autocast(x.device):
        for step in steps[1:]:
            inputs = [values[number] for number in step.inputs]
            tensors, count = unpack(step, inputs[0].shape[1], rest)
            rest = rest[count:]
            out = _plain_step(step, inputs, [t.to(inputs[0].dtype) for t in tensors])
            if step.addend is not None:
                out = out + values[step.addend]
            out = ACTIVATIONS[step.activation](out)
            values.append(out if step.residual is None else out + values[step.residual])
    return values[-1].to(x.dtype)


def _plain_step(step: Step, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    x = inputs[0]
    match step.operation:
        case "convolution" | "depthwise":
            groups = step.channels if step.operation == "depthwise" else step.groups
            return functional.conv2d(x, *weights, step.stride, step.padding, groups=groups)
        case "pool_mixer":
            pooled = functional.avg_pool2d(x, step.kernel, 1, step.padding, count_include_pad=False)
            return x + weights[0].reshape(-1, 1, 1) * (pooled - x)
        case "layer_norm":
            return functional.layer_norm(x.movedim(1, -1), x.shape[1:2], *weights, step.eps).movedim(-1, 1)
        case "mean":
            return x.mean((2, 3), keepdim=True)
        case "multiply":
            return x * inputs[1]
        case "upsample":
            return functional.interpolate(x, scale_factor=2, mode="bilinear")
        case "linear_attention":
            joined = torch.cat(list(inputs), dim=1)
            return multi_scale_linear_attention.plain(joined, [], [], [], [], step.head_dim, step.eps)
        case "attention":
            return _plain_attention(step, inputs, weights)
        case "cascade":
            return _plain_cascade(step, x, weights)
    raise AssertionError(step.operation)


def _plain_attention(step: Step, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    heads, keys, values = step.heads, step.heads * rounded(step.head_dim), step.heads * rounded(step.value_dim)
    q_and_k = inputs[0].split(keys, dim=1)[:2] if len(inputs) < 3 else inputs[:2]
    q, k, v = (
        of_heads(t.transpose(0, 1), heads, dim).transpose(0, 1).flatten(2).unflatten(1, (heads, dim)).mT
        for t, dim in zip((*q_and_k, inputs[-1][:, -values:]), (step.head_dim, step.head_dim, step.value_dim), strict=True)
    )
    out = biased_attention.plain(q, k, v, weights[0], list(weights[1:]), step.scale).mT
    behind = rounded(step.value_dim) - step.value_dim
    return functional.pad(out, (0, 0, 0, behind)).reshape(len(out), values, *inputs[0].shape[2:])


def _plain_cascade(step: Step, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    qkv, qkv_bias, *taps, tap_bias, bias = weights
    projections = list(qkv.unsqueeze(-1).unsqueeze(-1))
    return cascaded_group_attention.plain(
        x, projections, list(qkv_bias), taps, list(tap_bias), bias, step.scale, *step.window
    )


def _shape(x: torch.Tensor, weights: Sequence[torch.Tensor], program: str) -> tuple[int, ...]:
    steps = parse(program)
    return (x.shape[0], steps[-1].channels, *sizes(steps, *x.shape[2:])[-1])


def fake(x: torch.Tensor, program: str) -> torch.Tensor:
    """A result without values, for graphs."""
    return empty_image_in_order_of(x, _shape(x, (), program))


OPERATOR = InferenceOperator("block", plain, _shape)
serves = OPERATOR.serves

__all__ = ["ACTIVATIONS", "Block", "block", "parse", "plain", "serves", "takes"]
