"""The square of a ReLU, times a weight a channel, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from effattn._triton.configs import Launch
from effattn._triton.layout import image_strides
from effattn._triton.numerics import TargetOptions, relu
from effattn._triton.reduction import add_up_partial, new_partial
from effattn._triton.tiles import load_tile, store_tile, tile_and_group

LAUNCHES = {"forward": {1: Launch(128, 32)}, "backward": {1: Launch(64, 32)}}


@triton.jit
def _forward(
    x, weight, out,
    channels, tokens, scale,
    x_batch, x_channel, x_token,
    o_batch, o_channel, o_token,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of tokens, of some channels: program (chunk of channels, tile, image)."""
    chunks = tl.cdiv(channels, CHANNELS)
    piece, batch = tile_and_group(chunks * tl.cdiv(tokens, TOKENS))
    first, token = piece % chunks * CHANNELS, piece // chunks * TOKENS + tl.arange(0, TOKENS)
    channel = first + tl.arange(0, CHANNELS)
    factor = scale * tl.load(weight + channel, mask=channel < channels, other=0.0)
    x_begin = x + batch.to(tl.int64) * x_batch
    positive = relu(load_tile(x_begin, token, tokens, x_token, first, CHANNELS, channels, x_channel)).to(tl.float32)
    o_begin = out + batch.to(tl.int64) * o_batch
    store_tile(
        factor[None, :] * (positive * positive), o_begin, token, tokens, o_token, first, CHANNELS, channels, o_channel
    )


@triton.jit
def _backward(
    grad_out, x, weight, grad_x, grad_weight,
    channels, tokens, scale,
    g_batch, g_channel, g_token,
    x_batch, x_channel, x_token,
    d_batch, d_channel, d_token,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_x (d) of a tile, and its part of the weights' gradients: program (chunk of channels, tile, image)."""
    chunks, tiles = tl.cdiv(channels, CHANNELS), tl.cdiv(tokens, TOKENS)
    piece, batch = tile_and_group(chunks * tiles)
    first, tile = piece % chunks * CHANNELS, piece // chunks
    token, channel = tile * TOKENS + tl.arange(0, TOKENS), first + tl.arange(0, CHANNELS)
    factor = 2 * scale * tl.load(weight + channel, mask=channel < channels, other=0.0)
    g_begin, x_begin = grad_out + batch.to(tl.int64) * g_batch, x + batch.to(tl.int64) * x_batch
    grad = load_tile(g_begin, token, tokens, g_token, first, CHANNELS, channels, g_channel).to(tl.float32)
    positive = relu(load_tile(x_begin, token, tokens, x_token, first, CHANNELS, channels, x_channel)).to(tl.float32)
    # The gate is relu's, which lets NaN through.
    grad_tile = tl.where(positive <= 0, 0.0, factor[None, :] * positive * grad)
    d_begin = grad_x + batch.to(tl.int64) * d_batch
    store_tile(grad_tile, d_begin, token, tokens, d_token, first, CHANNELS, channels, d_channel)
    part = grad_weight + (batch * tiles + tile).to(tl.int64) * channels
    tl.store(part + channel, scale * tl.sum(positive * positive * grad, 0), mask=channel < channels)


def _options(kernel: str, channels: int, target: TargetOptions) -> dict[str, int]:
    return target.options("squared_relu", kernel, channels, CHANNELS=channels)


def forward(
    results: Sequence[torch.Tensor], x: torch.Tensor, weight: torch.Tensor, scale: float, target: TargetOptions
) -> None:
    """Fills the output; there is something to fill."""
    (out,) = results
    (batch, channels), tokens = x.shape[:2], x.shape[2] * x.shape[3]
    options = _options("forward", channels, target)
    grid = (triton.cdiv(channels, options["CHANNELS"]) * triton.cdiv(tokens, options["TOKENS"]) * batch,)
    _forward[grid](x, weight, out, channels, tokens, scale, *image_strides(x), *image_strides(out), **options)


def backward(grads: Sequence[torch.Tensor], *arguments: Any) -> None:
    """Fills the gradients of x and weight; there is something to fill."""
    grad_out, x, weight, scale, target = arguments
    grad_x, grad_weight = grads
    (batch, channels), tokens = x.shape[:2], x.shape[2] * x.shape[3]
    options = _options("backward", channels, target)
    parts = triton.cdiv(tokens, options["TOKENS"]) * batch
    partial = new_partial(grad_weight, parts)
    _backward[(triton.cdiv(channels, options["CHANNELS"]) * parts,)](
        grad_out, x, weight, grad_x, partial, channels, tokens, scale,
        *image_strides(grad_out), *image_strides(x), *image_strides(grad_x), **options,
    )  # fmt: skip
    add_up_partial(partial, grad_weight)
