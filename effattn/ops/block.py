"""Blocks of networks in evaluation: programs (:mod:`effattn.ops._program`), with weights packed once for many calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch.nn import functional

from effattn.backends._memory import empty_image_in_order_of
from effattn.ops import _recording, cascaded_group_attention
from effattn.ops._operator import InferenceOperator
from effattn.ops._packed import of_heads, rounded
from effattn.ops._plain import mix_heads, without_autocast
from effattn.ops._program import Step, parse, sizes
from effattn.ops._program_weights import size_of_weights, unpack

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
            return _plain_linear_attention(step, inputs)
        case "attention":
            return _plain_attention(step, inputs, weights)
        case "cascade":
            return _plain_cascade(step, x, weights)
    raise AssertionError(step.operation)


def _plain_linear_attention(step: Step, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    heads = torch.cat(list(inputs), dim=1).flatten(2).unflatten(1, (-1, 3, step.head_dim)).mT
    q, k, v = heads.unbind(2)
    out = q.relu() @ (k.relu().mT @ functional.pad(v, (0, 1), value=1.0))
    out = out[..., :-1] / (out[..., -1:] + step.eps)
    return out.mT.flatten(1, 2).unflatten(2, inputs[0].shape[2:])


def _plain_attention(step: Step, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    heads, keys, values = step.heads, step.heads * rounded(step.head_dim), step.heads * rounded(step.value_dim)
    q_and_k = inputs[0].split(keys, dim=1)[:2] if len(inputs) < 3 else inputs[:2]
    dims = (step.head_dim, step.head_dim, step.value_dim)
    q, k, v = (
        of_heads(t.transpose(0, 1), heads, dim).transpose(0, 1).flatten(2).unflatten(1, (heads, dim)).mT
        for t, dim in zip((*q_and_k, inputs[-1][:, -values:]), dims, strict=True)
    )
    bias, *mix = weights
    logits = mix_heads(step.scale * q @ k.mT + bias, mix[:2])
    out = (mix_heads(logits.softmax(-1), mix[2:]) @ v).mT
    behind = rounded(step.value_dim) - step.value_dim
    return functional.pad(out, (0, 0, 0, behind)).reshape(len(out), values, *inputs[0].shape[2:])


def _plain_cascade(step: Step, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    qkv, qkv_bias, *taps, tap_bias, bias = weights
    projections = list(qkv.unsqueeze(-1).unsqueeze(-1))
    return cascaded_group_attention.plain(
        x, projections, list(qkv_bias), taps, list(tap_bias), bias, step.scale, *step.window
    )


def _shape(x: torch.Tensor, weights: Sequence[torch.Tensor], program: str) -> tuple[int, ...]:
    try:
        steps = parse(program)
        batch, _, height, width = x.shape
        return (batch, int(steps[-1].channels), *sizes(steps, height, width)[-1])
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise RuntimeError(f"block: no program for x of shape {tuple(x.shape)}: {error}") from None


OPERATOR = InferenceOperator("block", plain, _shape)
serves = OPERATOR.serves

# --- in graphs of torch.compile ---------------------------------------------------------------------------------

#: What nodes call, by number: (image, program) -> result.
CALLED_BY_GRAPHS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def empty_result(x: torch.Tensor, program: str) -> torch.Tensor:
    """A result without values."""
    return empty_image_in_order_of(x, _shape(x, (), program))


def _call(x: torch.Tensor, module: int, program: str) -> torch.Tensor:
    called = CALLED_BY_GRAPHS.get(module)
    if called is None:
        raise RuntimeError("block_of_module: the module that this graph was compiled for is gone")
    out: torch.Tensor = called.call_from_graph(x, program)
    return out


def _plain_of_module(x: torch.Tensor, module: int, program: str) -> torch.Tensor:
    """For those who count operations."""
    return plain(x, [x.new_zeros(size_of_weights(program))], program)


_LIBRARY = torch.library.Library("effattn", "FRAGMENT")
_LIBRARY.define("block_of_module(Tensor x, int module, str program) -> Tensor")
_LIBRARY.impl("block_of_module", _call, "CPU")
torch.library.register_fake(
    "effattn::block_of_module", lambda x, module, program: empty_result(x, program), lib=_LIBRARY
)
_recording.register("effattn::block_of_module", _plain_of_module)
