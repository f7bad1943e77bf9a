"""Depthwise convolutions of images with zeros around them, and the gradients of their weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from effattn._triton.configs import MAX_CHANNELS, MAX_TAPS, Launch, split_tiles
from effattn._triton.numerics import TargetOptions
from effattn._triton.reduction import add_up_partial, new_partial
from effattn._triton.tiles import load_tile, tile_and_group

#: By the memory order of images. All taps are taken at once, of the channels of a program.
LAUNCHES = {
    "nchw": {MAX_CHANNELS: Launch(32, 1)},
    "channels_last": {MAX_CHANNELS: Launch(4, 8)},
}


@triton.jit
def convolved(
    image, taps, token, tokens, height, width, token_stride, first, channels, channel_stride,
    kernel, MAX_KERNEL: tl.constexpr, SIGN: tl.constexpr, CHANNELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution of (tokens, CHANNELS) from channel ``first`` on; its transpose where SIGN is -1.

    ``image`` and ``taps`` (channels, kernel * kernel) begin at the same channel. Tokens behind ``tokens`` are 0. WHOLE
    says that CHANNELS divides ``channels``: masks are then the same for all of them, and take a register less each.
    """
    channel = first + tl.arange(0, CHANNELS)
    there = channel < channels
    row, col = token // width, token % width
    at = image + token[:, None].to(tl.int64) * token_stride + channel[None, :].to(tl.int64) * channel_stride
    total = tl.zeros((token.shape[0], CHANNELS), tl.float32)
    for i in range(kernel):
        down = SIGN * (i - kernel // 2)
        row_inside = (row + down >= 0) & (row + down < height) & (token < tokens)
        # The taps of a row at once: what they load does not wait for each other.
        for j in tl.static_range(MAX_KERNEL):
            right = SIGN * (j - kernel // 2)
            is_tap = j < kernel
            inside = row_inside & (col + right >= 0) & (col + right < tl.where(is_tap, width, 0))
            shifted = at + tl.cast(down * width + right, tl.int64) * token_stride
            inside = inside[:, None] if WHOLE else inside[:, None] & there[None, :]
            value = tl.load(shifted, mask=inside, other=0.0).to(tl.float32)
            tap = taps + channel * (kernel * kernel) + i * kernel + j
            weight = tl.load(tap, mask=channel < tl.where(is_tap, channels, 0), other=0.0)
            total += value * weight[None, :]
    return total


@triton.jit
def _depthwise_gradients(
    grad, image, grad_weight, grad_bias,
    channels, batches, height, width, part_tiles,
    g_batch, g_channel, g_token, x_batch, x_channel, x_token,
    KERNEL: tl.constexpr, TAPS: tl.constexpr, DW_BIAS: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of taps and biases, over a part of all tiles: program (chunk of channels, part)."""
    tokens = height * width
    chunk, part = tile_and_group(tl.cdiv(channels, CHUNK))
    channel = chunk * CHUNK + tl.arange(0, CHUNK)
    there = channel < channels
    tap = tl.arange(0, TAPS)
    down, right = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
    tiles = tl.cdiv(tokens, TOKENS)
    total = tl.zeros((TAPS, TOKENS, CHUNK), tl.float32)
    bias = tl.zeros((TOKENS, CHUNK), tl.float32)
    for tile in range(part * part_tiles, tl.minimum((part + 1) * part_tiles, batches * tiles)):
        batch, token = (tile // tiles).to(tl.int64), tile % tiles * TOKENS + tl.arange(0, TOKENS)
        begin = grad + batch * g_batch
        value = load_tile(begin, token, tokens, g_token, chunk * CHUNK, CHUNK, channels, g_channel)
        row, col = token[None, :] // width + down[:, None], token[None, :] % width + right[:, None]
        inside = (row >= 0) & (row < height) & (col >= 0) & (col < width) & (tap[:, None] < KERNEL * KERNEL)
        inside &= token[None, :] < tokens
        shifted = (row * width + col).to(tl.int64) * x_token
        at = image + batch * x_batch + shifted[:, :, None] + channel[None, None, :].to(tl.int64) * x_channel
        x = tl.load(at, mask=inside[:, :, None] & there[None, None, :], other=0.0).to(tl.float32)
        total += x * value[None, :, :]
        if DW_BIAS:
            bias += value
    begin = grad_weight + part.to(tl.int64) * channels * (KERNEL * KERNEL)
    at = begin + channel[None, :] * (KERNEL * KERNEL) + tap[:, None]
    tl.store(at, tl.sum(total, 1), mask=(tap[:, None] < KERNEL * KERNEL) & there[None, :])
    if DW_BIAS:
        tl.store(grad_bias + part.to(tl.int64) * channels + channel, tl.sum(bias, 0), mask=there)


def weight_gradients(
    grad: torch.Tensor,
    image: torch.Tensor,
    sizes: tuple[int, int, int, int],
    strides: tuple[tuple[int, int, int], tuple[int, int, int]],
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor | None,
    target: TargetOptions,
) -> None:
    """Fills the gradients of a weight (channels, 1, k, k) and of a bias, if there is one.

    ``grad`` and ``image`` are where images (batch, channels, height, width), which are ``sizes``, begin in memory;
    ``strides`` are those of their batch, channels and tokens.
    """
    (batch, channels, height, width), kernel = sizes, grad_weight.shape[-1]
    order = "channels_last" if strides[1][1] == 1 and channels > 1 else "nchw"
    options = target.options("depthwise", order, channels, CHUNK=channels)
    taps = triton.next_power_of_2(kernel**2)
    options["TOKENS"] = max(1, min(options["TOKENS"], MAX_TAPS // (taps * options["CHUNK"])))
    chunks = triton.cdiv(channels, options["CHUNK"])
    part_tiles, count = split_tiles(chunks, batch, height * width, options["TOKENS"])
    partial, partial_bias = (new_partial(g, count) for g in (grad_weight, grad_bias))
    _depthwise_gradients[(chunks * count,)](
        grad, image, partial, image if partial_bias is None else partial_bias,
        channels, batch, height, width, part_tiles, *strides[0], *strides[1],
        KERNEL=kernel, TAPS=taps, DW_BIAS=grad_bias is not None,
        **options,
    )  # fmt: skip
    add_up_partial(partial, grad_weight)
    add_up_partial(partial_bias, grad_bias)
