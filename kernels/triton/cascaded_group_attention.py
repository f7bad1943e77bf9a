"""Cascaded group attention, forward and backward: a program goes through all heads of a window.

What a head makes goes from one step to the next through workspace of the program's own, in float32, which stays in the
caches of its multiprocessor; between steps its threads wait for each other. The forward has as many programs as fill a
GPU, which take one window after the other. The backward goes forward once more and keeps everything, then back, and
then sums the gradients of the weights over all windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from effattn._triton.configs import MAX_CHANNELS, Launch, split_tiles
from effattn._triton.depthwise import convolved, weight_gradients
from effattn._triton.layout import image_strides
from effattn._triton.numerics import TargetOptions, product, round_to
from effattn._triton.reduction import add_up
from effattn._triton.softmax import attended_tile, product_tile, softmax_gradients_tile
from effattn._triton.tiles import load_tile, store_tile, tile_and_group

Tensors = Sequence[torch.Tensor]

#: Programs of the forward, at most: each has memory of its own, which should stay in the GPU's cache.
CASCADE_PROGRAMS = 1024

#: Of forward and backward by the tokens of a window.
LAUNCHES = {
    "cga": {
        16: Launch(16, 32, keys=16),
        32: Launch(16, 32, num_warps=8, keys=32),
        64: Launch(64, 16, num_warps=8, keys=16),
    },
    "weight_gradients": {MAX_CHANNELS: Launch(64, 32)},
}


@triton.jit
def _of_head(head, SIZES: tl.constexpr):
    """SIZES[head]"""
    found = head * 0
    for i in tl.static_range(len(SIZES)):
        found = tl.where(head == i, SIZES[i], found)
    return found


@triton.jit
def _pixels(window, token, height, width, window_height, window_width):
    """Of a window's tokens the image, the pixel in it, and whether there is such a one."""
    across = tl.cdiv(width, window_width)
    windows = tl.cdiv(height, window_height) * across
    batch, within = window // windows, window % windows
    row = within // across * window_height + token // window_width
    col = within % across * window_width + token % window_width
    inside = (token < window_height * window_width) & (row < height) & (col < width)
    return batch.to(tl.int64), row * width + col, inside


@triton.jit
def _image_tile(image, pixel, inside, pixel_stride, channel_stride, first, channels, CHUNK: tl.constexpr):
    """Pointers to (tokens, CHUNK) of a head's channels from ``first`` on, and which of them there are."""
    channel = first + tl.arange(0, CHUNK)
    at = image + pixel[:, None].to(tl.int64) * pixel_stride + channel[None, :].to(tl.int64) * channel_stride
    return at, inside[:, None] & (channel[None, :] < channels)


@triton.jit
def _load_image(image, pixel, inside, pixel_stride, channel_stride, first, channels, CHUNK: tl.constexpr):
    at, there = _image_tile(image, pixel, inside, pixel_stride, channel_stride, first, channels, CHUNK)
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store_image(x, image, pixel, inside, pixel_stride, channel_stride, first, channels, CHUNK: tl.constexpr):
    at, there = _image_tile(image, pixel, inside, pixel_stride, channel_stride, first, channels, CHUNK)
    tl.store(at, round_to(x, image.dtype.element_ty), mask=there)


@triton.jit
def _cga_forward(
    x, weights, bias, out, feats, qkvs, qs,
    heads, key_dim, value_dim, height, width, window_height, window_width, windows, programs, scale,
    x_batch, x_channel, x_pixel, o_batch, o_channel, o_pixel,
    KEPT: tl.constexpr, KERNELS: tl.constexpr, TAPS: tl.constexpr, MAX_KERNEL: tl.constexpr,
    QKV_BIAS: tl.constexpr, DW_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Windows, one after the other: program (first of them).

    ``feats`` (N, value_dim), ``qkvs`` (N, 2 key_dim + value_dim) and ``qs`` (N, key_dim) are this program's, and
    another's follow; if KEPT, of every head of every window. ``weights`` are those of all heads, one behind the
    other: 1x1 weights, their biases, taps, their biases.
    """
    program, tokens, outputs = tl.program_id(0), window_height * window_width, 2 * key_dim + value_dim
    qkv_biases = weights + heads * outputs * value_dim
    all_taps = qkv_biases + heads * outputs * QKV_BIAS
    dw_biases = all_taps + TAPS[len(KERNELS)] * key_dim
    for window in range(program, windows, programs):
        for head in range(heads):
            slot = tl.cast(window, tl.int64) * heads + head if KEPT else tl.cast(program, tl.int64)
            feat, qkv, q = (
                feats + slot * tokens * value_dim,
                qkvs + slot * tokens * outputs,
                qs + slot * tokens * key_dim,
            )
            next_feat = tokens * value_dim if KEPT else 0
            if head == 0:
                for first in range(0, tokens, TOKENS):
                    token = first + tl.arange(0, TOKENS)
                    batch, pixel, inside = _pixels(window, token, height, width, window_height, window_width)
                    begin = x + batch * x_batch
                    for channel in range(0, value_dim, CHUNK):
                        tile = _load_image(begin, pixel, inside, x_pixel, x_channel, channel, value_dim, CHUNK)
                        store_tile(tile, feat, token, tokens, value_dim, channel, CHUNK, value_dim, 1)
                tl.debug_barrier()

            weight = weights + head * outputs * value_dim
            for first in range(0, tokens, TOKENS):
                token = first + tl.arange(0, TOKENS)
                for output in range(0, outputs, CHUNK):
                    # (tokens, value_dim) by the transposed weight (value_dim, outputs)
                    tile = product_tile(
                        feat, token, tokens, value_dim, value_dim, 1, weight, 1, value_dim, output, outputs,
                        CHUNK, CHUNK, PRECISION,
                    )  # fmt: skip
                    if QKV_BIAS:
                        at = output + tl.arange(0, CHUNK)
                        tile += tl.load(qkv_biases + head * outputs + at, mask=at < outputs, other=0.0)[None, :]
                    store_tile(tile, qkv, token, tokens, outputs, output, CHUNK, outputs, 1)
            tl.debug_barrier()

            taps = all_taps + _of_head(head, TAPS) * key_dim
            for first in range(0, tokens, TOKENS):
                token = first + tl.arange(0, TOKENS)
                for channel in range(0, key_dim, CHUNK):
                    tile = convolved(
                        qkv, taps, token, tokens, window_height, window_width, outputs, channel, key_dim, 1,
                        _of_head(head, KERNELS), MAX_KERNEL, 1, CHUNK, False,
                    )  # fmt: skip
                    if DW_BIAS:
                        at = channel + tl.arange(0, CHUNK)
                        tile += tl.load(dw_biases + head * key_dim + at, mask=at < key_dim, other=0.0)[None, :]
                    store_tile(tile, q, token, tokens, key_dim, channel, CHUNK, key_dim, 1)
            tl.debug_barrier()

            for first in range(0, tokens, TOKENS):
                token = first + tl.arange(0, TOKENS)
                batch, pixel, inside = _pixels(window, token, height, width, window_height, window_width)
                for channel in range(0, value_dim, CHUNK):
                    tile = attended_tile(
                        q, token, tokens, key_dim, 1, qkv + key_dim, tokens, outputs, 1, key_dim,
                        bias + tl.cast(head, tl.int64) * tokens * tokens, scale,
                        qkv + 2 * key_dim, outputs, 1, channel, value_dim, KEYS, CHUNK, CHUNK, PRECISION,
                    )  # fmt: skip
                    at = out + batch * o_batch + tl.cast(head * value_dim, tl.int64) * o_channel
                    _store_image(tile, at, pixel, inside, o_pixel, o_channel, channel, value_dim, CHUNK)
                    if head + 1 < heads:
                        at = x + batch * x_batch + tl.cast((head + 1) * value_dim, tl.int64) * x_channel
                        tile += _load_image(at, pixel, inside, x_pixel, x_channel, channel, value_dim, CHUNK)
                        store_tile(tile, feat + next_feat, token, tokens, value_dim, channel, CHUNK, value_dim, 1)
            tl.debug_barrier()


@triton.jit
def _cga_backward(
    grad_out, weights, bias, qkvs, qs, grads, weights_of_pairs, grad_logits, grad_qs, grad_qkvs, grad_x,
    heads, key_dim, value_dim, height, width, window_height, window_width, scale,
    g_batch, g_channel, g_pixel, d_batch, d_channel, d_pixel,
    KERNELS: tl.constexpr, TAPS: tl.constexpr, MAX_KERNEL: tl.constexpr, QKV_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All heads of a window, from the last: program (window).

    ``grads`` (N, value_dim), of a head's output, and ``weights_of_pairs`` (N, N), its softmax, are this program's;
    everything else is kept of every head.
    """
    window, tokens, outputs = tl.program_id(0), window_height * window_width, 2 * key_dim + value_dim
    all_taps = weights + heads * outputs * (value_dim + QKV_BIAS)
    grad = grads + tl.cast(window, tl.int64) * tokens * value_dim
    softmax = weights_of_pairs + tl.cast(window, tl.int64) * tokens * tokens
    for backwards in range(heads):
        head = heads - 1 - backwards
        slot = tl.cast(window, tl.int64) * heads + head
        qkv, q, grad_pairs = (
            qkvs + slot * tokens * outputs,
            qs + slot * tokens * key_dim,
            grad_logits + slot * tokens * tokens,
        )
        grad_qkv, grad_q = grad_qkvs + slot * tokens * outputs, grad_qs + slot * tokens * key_dim
        if backwards == 0:
            for first in range(0, tokens, TOKENS):
                token = first + tl.arange(0, TOKENS)
                batch, pixel, inside = _pixels(window, token, height, width, window_height, window_width)
                at = grad_out + batch * g_batch + tl.cast(head * value_dim, tl.int64) * g_channel
                for channel in range(0, value_dim, CHUNK):
                    tile = _load_image(at, pixel, inside, g_pixel, g_channel, channel, value_dim, CHUNK)
                    store_tile(tile, grad, token, tokens, value_dim, channel, CHUNK, value_dim, 1)
            tl.debug_barrier()

        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)
            softmax_gradients_tile(
                q, token, tokens, key_dim, 1, qkv + key_dim, tokens, outputs, 1, key_dim,
                bias + tl.cast(head, tl.int64) * tokens * tokens, scale,
                grad, value_dim, 1, qkv + 2 * key_dim, outputs, 1, value_dim, softmax, grad_pairs,
                KEYS, CHUNK, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()

        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)
            for channel in range(0, key_dim, CHUNK):
                tile = scale * product_tile(
                    grad_pairs, token, tokens, tokens, tokens, 1, qkv + key_dim, outputs, 1, channel, key_dim,
                    KEYS, CHUNK, PRECISION,
                )  # fmt: skip
                store_tile(tile, grad_q, token, tokens, key_dim, channel, CHUNK, key_dim, 1)
                tile = scale * product_tile(
                    grad_pairs, token, tokens, 1, tokens, tokens, q, key_dim, 1, channel, key_dim,
                    KEYS, CHUNK, PRECISION,
                )  # fmt: skip
                store_tile(tile, grad_qkv + key_dim, token, tokens, outputs, channel, CHUNK, key_dim, 1)
            for channel in range(0, value_dim, CHUNK):
                tile = product_tile(
                    softmax, token, tokens, 1, tokens, tokens, grad, value_dim, 1, channel, value_dim,
                    KEYS, CHUNK, PRECISION,
                )  # fmt: skip
                store_tile(tile, grad_qkv + 2 * key_dim, token, tokens, outputs, channel, CHUNK, value_dim, 1)
        tl.debug_barrier()

        taps = all_taps + _of_head(head, TAPS) * key_dim
        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)
            for channel in range(0, key_dim, CHUNK):
                tile = convolved(
                    grad_q, taps, token, tokens, window_height, window_width, key_dim, channel, key_dim, 1,
                    _of_head(head, KERNELS), MAX_KERNEL, -1, CHUNK, False,
                )  # fmt: skip
                store_tile(tile, grad_qkv, token, tokens, outputs, channel, CHUNK, key_dim, 1)
        tl.debug_barrier()

        weight = weights + head * outputs * value_dim
        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)
            batch, pixel, inside = _pixels(window, token, height, width, window_height, window_width)
            for channel in range(0, value_dim, CHUNK):
                tile = product_tile(
                    grad_qkv, token, tokens, outputs, outputs, 1, weight, value_dim, 1, channel, value_dim,
                    CHUNK, CHUNK, PRECISION,
                )  # fmt: skip
                at = grad_x + batch * d_batch + tl.cast(head * value_dim, tl.int64) * d_channel
                _store_image(tile, at, pixel, inside, d_pixel, d_channel, channel, value_dim, CHUNK)
                if head > 0:  # what this head took is the output of the one before
                    at = grad_out + batch * g_batch + tl.cast((head - 1) * value_dim, tl.int64) * g_channel
                    tile += _load_image(at, pixel, inside, g_pixel, g_channel, channel, value_dim, CHUNK)
                    store_tile(tile, grad, token, tokens, value_dim, channel, CHUNK, value_dim, 1)
        tl.debug_barrier()


@triton.jit
def _weight_gradients(
    grad_qkvs, feats, grad_weights, grad_biases,
    heads, value_dim, outputs, tokens, windows, part_tiles, count,
    QKV_BIAS: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of 1x1 weights and biases, over a part of all windows' tiles: program (inputs, outputs, part, head)."""
    across, down = tl.cdiv(value_dim, CHUNK), tl.cdiv(outputs, CHUNK)
    piece, head = tile_and_group(across * down * count)
    col, row, part = piece % across * CHUNK, piece // across % down * CHUNK, piece // (across * down)
    tiles = tl.cdiv(tokens, TOKENS)
    total = tl.zeros((CHUNK, CHUNK), tl.float32)
    bias = tl.zeros((CHUNK,), tl.float32)
    for tile in range(part * part_tiles, tl.minimum((part + 1) * part_tiles, windows * tiles)):
        slot, token = (tile // tiles).to(tl.int64) * heads + head, tile % tiles * TOKENS + tl.arange(0, TOKENS)
        grad = load_tile(grad_qkvs + slot * tokens * outputs, token, tokens, outputs, row, CHUNK, outputs, 1)
        feat = load_tile(feats + slot * tokens * value_dim, token, tokens, value_dim, col, CHUNK, value_dim, 1)
        total += product(tl.trans(grad), feat, PRECISION)
        bias += tl.sum(grad, 0)
    begin = grad_weights + (head * count + part).to(tl.int64) * outputs * value_dim
    output = row + tl.arange(0, CHUNK)
    store_tile(total, begin, output, outputs, value_dim, col, CHUNK, value_dim, 1)
    if QKV_BIAS:
        at = grad_biases + (head * count + part).to(tl.int64) * outputs + output
        tl.store(at, bias, mask=output < tl.where(col == 0, outputs, 0))


@dataclass(frozen=True)
class Weights:
    """A tensor a head in each list, in float32; lists of biases may be empty. ``bias`` (heads, N, N) is contiguous."""

    qkv: Tensors
    qkv_biases: Tensors
    dw: Tensors
    dw_biases: Tensors
    bias: torch.Tensor


class _LaunchPlan:
    """What the launches of a call share."""

    def __init__(self, x: torch.Tensor, weights: Weights, window: tuple[int, int], target: TargetOptions) -> None:
        batch, _, self.height, self.width = x.shape
        self.window, self.target, self.bias = window, target, weights.bias
        self.heads, self.key_dim = len(weights.qkv), weights.dw[0].shape[0]
        self.outputs, self.value_dim = weights.qkv[0].shape[:2]
        self.tokens = window[0] * window[1]
        self.windows = batch * triton.cdiv(self.height, window[0]) * triton.cdiv(self.width, window[1])
        self.kernels = tuple(weight.shape[-1] for weight in weights.dw)
        every = (*weights.qkv, *weights.qkv_biases, *weights.dw, *weights.dw_biases)
        # One launch to join them, and none to know where each of them is.
        self.weights = torch.cat([t.reshape(-1) for t in every])
        self.options = {
            "KERNELS": self.kernels,
            "TAPS": (0, *accumulate(k * k for k in self.kernels)),
            "MAX_KERNEL": max(self.kernels),
            "QKV_BIAS": int(len(weights.qkv_biases) > 0),
            "PRECISION": target.precision,
            **target.options("cascaded_group_attention", "cga", self.tokens, CHUNK=max(self.key_dim, self.value_dim)),
        }

    def new(self, slots: int, *sizes: int) -> torch.Tensor:
        return self.weights.new_empty((slots, self.tokens, *sizes), dtype=torch.float32)

    def cga_forward(
        self, x: torch.Tensor, out: torch.Tensor, scale: float, has_dw_bias: bool, kept: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fills ``out``, and returns what every head of every window had, if it is kept."""
        programs = self.windows if kept else min(self.windows, CASCADE_PROGRAMS)
        slots = self.windows * self.heads if kept else programs
        of_heads = tuple(self.new(slots, size) for size in (self.value_dim, self.outputs, self.key_dim))
        _cga_forward[(programs,)](
            x, self.weights, self.bias, out, *of_heads,
            self.heads, self.key_dim, self.value_dim, self.height, self.width, *self.window,
            self.windows, programs, scale, *image_strides(x), *image_strides(out),
            KEPT=kept, DW_BIAS=has_dw_bias, **self.options,
        )  # fmt: skip
        return of_heads


def forward(results: Tensors, x: torch.Tensor, *rest: Any) -> None:
    """Fills the output (B, C, H, W)."""
    *lists, scale, height, width, target = rest
    weights = Weights(*lists)
    plan = _LaunchPlan(x, weights, (height, width), target)
    plan.cga_forward(x, *results, scale, len(weights.dw_biases) > 0, kept=False)


def backward(results: Sequence[Any], grad_out: torch.Tensor, x: torch.Tensor, *rest: Any) -> None:
    """Fills the gradients of x and of the weights."""
    *lists, scale, height, width, target = rest
    weights, window, grad_x, grads = Weights(*lists), (height, width), results[0], Weights(*results[1:])
    plan = _LaunchPlan(x, weights, window, target)
    has_dw_bias, has_qkv_bias = len(weights.dw_biases) > 0, len(weights.qkv_biases) > 0
    # The output is made once more where the gradient of x will be.
    feats, qkvs, qs = plan.cga_forward(x, grad_x, scale, has_dw_bias, kept=True)
    slots = plan.windows * plan.heads
    grad_logits = plan.new(slots, plan.tokens)
    grad_qs, grad_qkvs = torch.empty_like(qs), torch.empty_like(qkvs)
    _cga_backward[(plan.windows,)](
        grad_out, plan.weights, plan.bias, qkvs, qs, plan.new(plan.windows, plan.value_dim),
        plan.new(plan.windows, plan.tokens), grad_logits, grad_qs, grad_qkvs, grad_x,
        plan.heads, plan.key_dim, plan.value_dim, plan.height, plan.width, *window, scale,
        *image_strides(grad_out), *image_strides(grad_x), **plan.options,
    )  # fmt: skip
    by_window = grad_logits.view(1, plan.windows, -1)
    add_up(by_window, grads.bias)
    del grad_logits, by_window

    chunk = max(plan.value_dim, plan.outputs)
    options = target.options("cascaded_group_attention", "weight_gradients", plan.value_dim, CHUNK=chunk)
    pieces = triton.cdiv(plan.value_dim, options["CHUNK"]) * triton.cdiv(plan.outputs, options["CHUNK"])
    part_tiles, count = split_tiles(pieces * plan.heads, plan.windows, plan.tokens, options["TOKENS"])
    partial = feats.new_empty(plan.heads, count, plan.outputs, plan.value_dim)
    partial_bias = feats.new_empty(plan.heads, count, plan.outputs)
    _weight_gradients[(pieces * count * plan.heads,)](
        grad_qkvs, feats, partial, partial_bias,
        plan.heads, plan.value_dim, plan.outputs, plan.tokens, plan.windows, part_tiles, count,
        QKV_BIAS=has_qkv_bias, PRECISION=target.precision, **options,
    )  # fmt: skip
    _distribute(partial, grads.qkv)
    _distribute(partial_bias, grads.qkv_biases)

    sizes = (plan.windows, plan.key_dim, *window)
    strides = [(plan.heads * plan.tokens * channels, 1, channels) for channels in (plan.key_dim, plan.outputs)]
    for head, grad in enumerate(grads.dw):
        weight_gradients(
            grad_qs[head:], qkvs[head:], sizes, (strides[0], strides[1]), grad,
            grads.dw_biases[head] if has_dw_bias else None, target,
        )  # fmt: skip


def _distribute(partial: torch.Tensor, grads: Tensors) -> None:
    """The sums of parts (heads, count, ...), each to its head's tensor."""
    if grads:
        sums = partial.new_empty(partial.shape[0], *partial.shape[2:])
        add_up(partial, sums)
        torch._foreach_copy_(list(grads), [t.view(grad.shape) for t, grad in zip(sums, grads, strict=True)])
