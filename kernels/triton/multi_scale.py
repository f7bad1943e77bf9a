"""Multi-scale aggregation, and ReLU linear attention in all of its heads.

An aggregated tile of queries, keys or values is made where it is used, from shifted loads of the image and a product
with the head's matrix, and never written. The backward writes it, and its gradient, in float32: every gradient of the
convolutions needs a neighbourhood of either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from effattn._triton import linear_attention
from effattn._triton.configs import Launch, padded, split, split_tiles
from effattn._triton.depthwise import convolved, weight_gradients
from effattn._triton.kv_state import load_matrix, load_vector, matrix_pointers, vector_pointers
from effattn._triton.layout import image_strides
from effattn._triton.numerics import TargetOptions, clamp_subnormal, product, relu
from effattn._triton.reduction import add_up, add_up_partial, new_partial
from effattn._triton.tiles import load_tile, store_tile, tile_and_group

Tensors = Sequence[torch.Tensor]

LAUNCHES = {
    "aggregate": {16: Launch(64, 16), 32: Launch(64, 32), 64: Launch(32, 32), 128: Launch(16, 32)},
    "sum_tokens": {
        16: Launch(32, 16),
        32: Launch(16, 32),
        64: Launch(16, 16, num_warps=8),
        128: Launch(16, 32, num_warps=8),
    },
    "attend": {
        16: Launch(64, 16),
        32: Launch(32, 32),
        64: Launch(16, 16, num_warps=8),
        128: Launch(16, 16, num_warps=8),
    },
    "through_pointwise": {16: Launch(64, 16), 32: Launch(64, 32), 64: Launch(64, 32), 128: Launch(32, 32)},
    "pointwise_gradients": {
        16: Launch(64, 16),
        32: Launch(32, 32),
        64: Launch(32, 16, num_warps=8),
        128: Launch(16, 16, num_warps=8),
    },
    "input_gradients": {16: Launch(64, 16), 32: Launch(64, 16), 64: Launch(64, 16), 128: Launch(64, 16)},
}


@triton.jit
def _mixed(
    image, dw, dw_bias, token, tokens, height, width, token_stride, channel, head_dim: tl.constexpr,
    channel_stride, KERNEL: tl.constexpr, DW_BIAS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What the 1x1 convolution of the head_dim channels from ``channel`` on takes: (tokens, D)."""
    x = convolved(
        image + channel.to(tl.int64) * channel_stride, dw + channel * (KERNEL * KERNEL),
        token, tokens, height, width, token_stride, 0, head_dim, channel_stride,
        KERNEL, KERNEL, 1, D, head_dim == D,
    )  # fmt: skip
    if DW_BIAS:
        x += tl.load(dw_bias + channel + tl.arange(0, D), mask=tl.arange(0, D) < head_dim, other=0.0)[None, :]
    return x


@triton.jit
def _aggregated(
    image, dw, pw, dw_bias, pw_bias, token, tokens, height, width, token_stride,
    channel, first, head_dim: tl.constexpr, channel_stride,
    KERNEL: tl.constexpr, DW_BIAS: tl.constexpr, PW_BIAS: tl.constexpr,
    D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(tokens, CHUNK) of the head_dim channels from ``channel`` on, of which the chunk begins at ``first``."""
    mixed = _mixed(
        image, dw, dw_bias, token, tokens, height, width, token_stride, channel, head_dim, channel_stride,
        KERNEL, DW_BIAS, D,
    )  # fmt: skip
    output = first + tl.arange(0, CHUNK)
    matrix = load_tile(pw + channel * head_dim, output, head_dim, head_dim, 0, D, head_dim, 1)
    x = product(mixed, tl.trans(matrix), PRECISION)
    if PW_BIAS:
        x += tl.load(pw_bias + channel + output, mask=output < head_dim, other=0.0)[None, :]
    return x


@triton.jit
def _of_head(
    is_identity, image, dw, pw, dw_bias, pw_bias, token, tokens, height, width, token_stride,
    channel, first, head_dim: tl.constexpr, channel_stride,
    KERNEL: tl.constexpr, DW_BIAS: tl.constexpr, PW_BIAS: tl.constexpr,
    D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`_aggregated`, or the image itself; behind the last token 0."""
    if is_identity:
        begin = image + channel.to(tl.int64) * channel_stride
        x = load_tile(begin, token, tokens, token_stride, first, CHUNK, head_dim, channel_stride).to(tl.float32)
    else:
        x = _aggregated(
            image, dw, pw, dw_bias, pw_bias, token, tokens, height, width, token_stride,
            channel, first, head_dim, channel_stride, KERNEL, DW_BIAS, PW_BIAS, D, CHUNK, PRECISION,
        )  # fmt: skip
    return tl.where(token[:, None] < tokens, x, 0.0)


@triton.jit
def _aggregate(
    image, dw, pw, dw_bias, pw_bias, out,
    head_dim: tl.constexpr, groups, height, width,
    x_batch, x_channel, x_token, o_batch, o_channel, o_token,
    KERNEL: tl.constexpr, DW_BIAS: tl.constexpr, PW_BIAS: tl.constexpr,
    D: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a scale: program (chunk of channels, tile, group of head_dim channels, image)."""
    tokens, chunks = height * width, tl.cdiv(head_dim, CHUNK)
    piece, group = tile_and_group(tl.cdiv(tokens, TOKENS) * chunks)
    token = piece // chunks * TOKENS + tl.arange(0, TOKENS)
    first, batch, channel = piece % chunks * CHUNK, (group // groups).to(tl.int64), group % groups * head_dim
    x = _aggregated(
        image + batch * x_batch, dw, pw, dw_bias, pw_bias, token, tokens, height, width, x_token,
        channel, first, head_dim, x_channel, KERNEL, DW_BIAS, PW_BIAS, D, CHUNK, PRECISION,
    )  # fmt: skip
    begin = out + batch * o_batch + channel.to(tl.int64) * o_channel
    store_tile(x, begin, token, tokens, o_token, first, CHUNK, head_dim, o_channel)


@triton.jit
def _accumulate_kv_state(
    image, dw, pw, dw_bias, pw_bias, kv_state,
    head_dim: tl.constexpr, heads, first_head, all_heads, height, width, count, part_tokens,
    x_batch, x_channel, x_token,
    IDENTITY: tl.constexpr, KERNEL: tl.constexpr, DW_BIAS: tl.constexpr, PW_BIAS: tl.constexpr,
    D: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHUNK rows and columns of sum v relu(k)^T, and of sum relu(k): program (columns, rows, part, head, image).

    The heads are those of one scale and, if IDENTITY, before them those of the image itself.
    """
    tokens, chunks, together = height * width, tl.cdiv(head_dim, CHUNK), heads * (1 + IDENTITY)
    piece, group = tile_and_group(chunks * chunks * count)
    col, row, part = piece % chunks * CHUNK, piece // chunks % chunks * CHUNK, piece // (chunks * chunks)
    head, batch = group % together, group // together
    is_identity, channel = head < heads * IDENTITY, head % heads * 3 * head_dim
    begin = image + batch.to(tl.int64) * x_batch
    end = tl.minimum((part + 1) * part_tokens, tokens)
    matrix = tl.zeros((CHUNK, CHUNK), tl.float32)
    keys = tl.zeros((CHUNK,), tl.float32)
    for first in range(part * part_tokens, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        key = _of_head(
            is_identity, begin, dw, pw, dw_bias, pw_bias, token, end, height, width, x_token,
            channel + head_dim, col, head_dim, x_channel, KERNEL, DW_BIAS, PW_BIAS, D, CHUNK, PRECISION,
        )  # fmt: skip
        key = relu(key)
        keys += tl.sum(key, 0)
        value = _of_head(
            is_identity, begin, dw, pw, dw_bias, pw_bias, token, end, height, width, x_token,
            channel + 2 * head_dim, row, head_dim, x_channel, KERNEL, DW_BIAS, PW_BIAS, D, CHUNK, PRECISION,
        )  # fmt: skip
        matrix += product(tl.trans(value), key, PRECISION)
    group = (batch * all_heads + first_head + head) * count + part
    at, inside = matrix_pointers(kv_state, group, row, col, head_dim, head_dim, CHUNK, CHUNK)
    tl.store(at, matrix, mask=inside)
    at, inside = vector_pointers(kv_state, group, col, head_dim, head_dim, CHUNK)
    first_only = tl.arange(0, CHUNK) < tl.where(row == 0, CHUNK, 0)
    tl.store(at, keys, mask=inside & first_only)


@triton.jit
def _attend(
    image, dw, pw, dw_bias, pw_bias, kv_state, out,
    head_dim: tl.constexpr, heads, first_head, all_heads, height, width, eps,
    x_batch, x_channel, x_token, o_batch, o_channel, o_token,
    IDENTITY: tl.constexpr, KERNEL: tl.constexpr, DW_BIAS: tl.constexpr, PW_BIAS: tl.constexpr,
    D: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHUNK channels of the output of a tile of queries: program (chunk, tile, head, image); heads as above."""
    tokens, chunks, together = height * width, tl.cdiv(head_dim, CHUNK), heads * (1 + IDENTITY)
    piece, group = tile_and_group(tl.cdiv(tokens, TOKENS) * chunks)
    token = piece // chunks * TOKENS + tl.arange(0, TOKENS)
    value, head, batch = piece % chunks * CHUNK, group % together, group // together
    is_identity, channel = head < heads * IDENTITY, head % heads * 3 * head_dim
    begin = image + batch.to(tl.int64) * x_batch
    group = batch * all_heads + first_head + head
    numerator = tl.zeros((TOKENS, CHUNK), tl.float32)
    denominator = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, head_dim, CHUNK):
        query = _of_head(
            is_identity, begin, dw, pw, dw_bias, pw_bias, token, tokens, height, width, x_token,
            channel, first, head_dim, x_channel, KERNEL, DW_BIAS, PW_BIAS, D, CHUNK, PRECISION,
        )  # fmt: skip
        query = relu(query)
        matrix = load_matrix(kv_state, group, value, first, head_dim, head_dim, CHUNK, CHUNK)
        numerator += product(query, tl.trans(matrix), PRECISION)
        denominator += tl.sum(query * load_vector(kv_state, group, first, head_dim, head_dim, CHUNK)[None, :], 1)
    # Behind the last token eps alone, which may be 0, would be divided by.
    denominator = clamp_subnormal(tl.where(token < tokens, denominator + eps, 1.0))
    begin = out + batch.to(tl.int64) * o_batch + ((first_head + head) * head_dim).to(tl.int64) * o_channel
    store_tile(numerator / denominator[:, None], begin, token, tokens, o_token, value, CHUNK, head_dim, o_channel)


@triton.jit
def _through_pointwise(
    grad_out, pw, grad_mixed,
    head_dim: tl.constexpr, groups, tokens,
    g_batch, g_channel, g_token, m_batch, m_channel, m_token,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients in front of a scale's 1x1 convolution: program (chunk of channels, tile, group, image)."""
    chunks = tl.cdiv(head_dim, CHUNK)
    piece, group = tile_and_group(tl.cdiv(tokens, TOKENS) * chunks)
    token = piece // chunks * TOKENS + tl.arange(0, TOKENS)
    first, batch, channel = piece % chunks * CHUNK, (group // groups).to(tl.int64), group % groups * head_dim
    begin = grad_out + batch * g_batch + channel.to(tl.int64) * g_channel
    total = tl.zeros((TOKENS, CHUNK), tl.float32)
    for output in range(0, head_dim, CHUNK):
        grad = load_tile(begin, token, tokens, g_token, output, CHUNK, head_dim, g_channel).to(tl.float32)
        outputs = output + tl.arange(0, CHUNK)
        matrix = load_tile(pw + channel * head_dim, outputs, head_dim, head_dim, first, CHUNK, head_dim, 1)
        total += product(grad, matrix, PRECISION)
    begin = grad_mixed + batch * m_batch + channel.to(tl.int64) * m_channel
    store_tile(total, begin, token, tokens, m_token, first, CHUNK, head_dim, m_channel)


@triton.jit
def _pointwise_gradients(
    grad_out, image, dw, dw_bias, grad_pw, grad_bias,
    head_dim: tl.constexpr, groups, batches, height, width, part_tiles,
    g_batch, g_channel, g_token, x_batch, x_channel, x_token,
    KERNEL: tl.constexpr, DW_BIAS: tl.constexpr, PW_BIAS: tl.constexpr,
    D: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a scale's 1x1 weights and biases, over a part of all tiles: program (chunk of outputs, group, part)."""
    tokens, chunks = height * width, tl.cdiv(head_dim, CHUNK)
    piece, part = tile_and_group(chunks * groups)
    first, channel = piece % chunks * CHUNK, piece // chunks * head_dim
    tiles = tl.cdiv(tokens, TOKENS)
    matrix = tl.zeros((CHUNK, D), tl.float32)
    bias = tl.zeros((TOKENS, CHUNK), tl.float32)
    for tile in range(part * part_tiles, tl.minimum((part + 1) * part_tiles, batches * tiles)):
        batch, token = (tile // tiles).to(tl.int64), tile % tiles * TOKENS + tl.arange(0, TOKENS)
        begin = grad_out + batch * g_batch + channel.to(tl.int64) * g_channel
        grad = load_tile(begin, token, tokens, g_token, first, CHUNK, head_dim, g_channel).to(tl.float32)
        mixed = _mixed(
            image + batch * x_batch, dw, dw_bias, token, tokens, height, width, x_token,
            channel, head_dim, x_channel, KERNEL, DW_BIAS, D,
        )  # fmt: skip
        matrix += product(tl.trans(grad), mixed, PRECISION)
        if PW_BIAS:
            bias += grad
    row = channel + first + tl.arange(0, CHUNK)
    there = first + tl.arange(0, CHUNK) < head_dim
    channels = groups * head_dim
    begin = grad_pw + part.to(tl.int64) * channels * head_dim
    store_tile(matrix, begin, row, channel + head_dim, head_dim, 0, D, head_dim, 1)
    if PW_BIAS:
        tl.store(grad_bias + part.to(tl.int64) * channels + row, tl.sum(bias, 0), mask=there)


@triton.jit
def _input_gradients(
    grad_mixed, dw, before, out,
    channels, height, width,
    m_batch, m_channel, m_token, b_batch, b_channel, b_token, o_batch, o_channel, o_token,
    KERNEL: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``before`` and the gradients that come through a depthwise convolution: program (chunk, tile, image)."""
    tokens, chunks = height * width, tl.cdiv(channels, CHUNK)
    piece, group = tile_and_group(tl.cdiv(tokens, TOKENS) * chunks)
    token, batch = piece // chunks * TOKENS + tl.arange(0, TOKENS), group.to(tl.int64)
    first = piece % chunks * CHUNK
    x = load_tile(before + batch * b_batch, token, tokens, b_token, first, CHUNK, channels, b_channel).to(tl.float32)
    x += convolved(
        grad_mixed + batch * m_batch, dw, token, tokens, height, width, m_token, first, channels, m_channel,
        KERNEL, KERNEL, -1, CHUNK, WHOLE,
    )  # fmt: skip
    store_tile(x, out + batch * o_batch, token, tokens, o_token, first, CHUNK, channels, o_channel)


class _Weights:
    """Of a scale, contiguous; and how its kernels are specialised to them."""

    def __init__(self, image: torch.Tensor, lists: Sequence[Tensors], scale: int) -> None:
        self.dw, self.pw, dw_bias, pw_bias = (ts[scale].contiguous() if ts else None for ts in lists)
        self.kernel, self.has_dw_bias, self.has_pw_bias = lists[0][scale].shape[-1], bool(lists[2]), bool(lists[3])
        # In place of what is not there, anything: it is not read.
        self.dw_bias, self.pw_bias = (image if bias is None else bias for bias in (dw_bias, pw_bias))
        self.pointers = (self.dw, self.pw, self.dw_bias, self.pw_bias)

    def options(self, *names: str) -> dict[str, Any]:
        every = {"KERNEL": self.kernel, "DW_BIAS": self.has_dw_bias, "PW_BIAS": self.has_pw_bias}
        return {name: every[name] for name in names}


class _LaunchPlan:
    """What the launches of a call share."""

    def __init__(self, image: torch.Tensor, head_dim: int, target: TargetOptions) -> None:
        self.batch, self.channels, self.height, self.width = image.shape
        self.tokens, self.head_dim, self.groups = self.height * self.width, head_dim, self.channels // head_dim
        self.target = target

    def options(self, kernel: str, *, whole_heads: bool = True) -> dict[str, Any]:
        whole = {"D": padded(self.head_dim)} if whole_heads else {}
        options = self.target.options("multi_scale", kernel, self.head_dim, CHUNK=self.head_dim)
        return {**whole, "PRECISION": self.target.precision, **options}


_ALL = ("KERNEL", "DW_BIAS", "PW_BIAS")


def aggregate(results: Tensors, image: torch.Tensor, *rest: Any) -> None:
    """Fills the output (B, (1 + scales) * C, H, W), of any dtype, with the image and its scales.

    Weights are lists of a tensor a scale: depthwise, 1x1, their biases; of the last two none, or all.
    """
    *weights, head_dim, target = rest
    (out,) = results
    plan = _LaunchPlan(image, head_dim, target)
    options = plan.options("aggregate")
    identity, *scales = out.split(plan.channels, dim=1)
    identity.copy_(image)
    tiles = triton.cdiv(plan.tokens, options["TOKENS"]) * triton.cdiv(head_dim, options["CHUNK"])
    for i, of_scale in enumerate(scales):
        scale = _Weights(image, weights, i)
        _aggregate[(tiles * plan.batch * plan.groups,)](
            image, *scale.pointers, of_scale, head_dim, plan.groups, plan.height, plan.width,
            *image_strides(image), *image_strides(of_scale), **scale.options(*_ALL), **options,
        )  # fmt: skip


def attend(results: Tensors, image: torch.Tensor, *rest: Any) -> None:
    """Fills the output (B, (1 + scales) * C / 3, H, W) and the kv_state (B, heads of all scales, D + 1, D)."""
    *weights, head_dim, eps, target = rest
    out, kv_state = results
    plan = _LaunchPlan(image, head_dim, target)
    heads, scales = plan.groups // 3, len(weights[0])
    if scales == 0:
        linear_attention.forward((outputs_of(out, head_dim), kv_state), *heads_of(image, head_dim), eps, target)
        return
    all_heads = heads * (1 + scales)
    every = [_Weights(image, weights, i) for i in range(scales)]

    options = plan.options("sum_tokens")
    part_tokens, count = split(plan.batch * all_heads, plan.tokens, options["TOKENS"])
    partial = kv_state if count == 1 else kv_state.new_empty(plan.batch * all_heads, count, *kv_state.shape[2:])
    programs = triton.cdiv(head_dim, options["CHUNK"]) ** 2 * count * plan.batch
    for i, scale in enumerate(every):
        _accumulate_kv_state[(programs * heads * (1 + (i == 0)),)](
            image, *scale.pointers, partial, head_dim, heads, heads * (i + (i > 0)), all_heads,
            plan.height, plan.width, count, part_tokens, *image_strides(image),
            IDENTITY=int(i == 0), **scale.options(*_ALL), **options,
        )  # fmt: skip
    if count > 1:
        add_up(partial, kv_state)

    options = plan.options("attend")
    programs = triton.cdiv(head_dim, options["CHUNK"]) * triton.cdiv(plan.tokens, options["TOKENS"]) * plan.batch
    for i, scale in enumerate(every):
        _attend[(programs * heads * (1 + (i == 0)),)](
            image, *scale.pointers, kv_state, out, head_dim, heads, heads * (i + (i > 0)), all_heads,
            plan.height, plan.width, eps, *image_strides(image), *image_strides(out),
            IDENTITY=int(i == 0), **scale.options(*_ALL), **options,
        )  # fmt: skip


def heads_of(image: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, ...]:
    """q, k, v as (B, heads, N, D) views of an image (B, 3 * heads * D, H, W) with mergeable rows."""
    batch, channel, token = image_strides(image)
    sizes = (image.shape[0], image.shape[1] // (3 * head_dim), image.shape[2] * image.shape[3], head_dim)
    strides = (batch, 3 * head_dim * channel, token, channel)
    first = image.storage_offset()
    return tuple(image.as_strided(sizes, strides, first + i * head_dim * channel) for i in range(3))


def outputs_of(image: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, heads, N, D) as a view of an image (B, heads * D, H, W) with mergeable rows."""
    batch, channel, token = image_strides(image)
    sizes = (image.shape[0], image.shape[1] // head_dim, image.shape[2] * image.shape[3], head_dim)
    return image.as_strided(sizes, (batch, head_dim * channel, token, channel), image.storage_offset())


def aggregate_backward(results: Sequence[Any], grad_out: torch.Tensor, image: torch.Tensor, *rest: Any) -> None:
    """Fills the gradients of the image and of the weights, whose biases may be none."""
    *weights, head_dim, target = rest
    grad_image, *grad_weights = results
    plan = _LaunchPlan(image, head_dim, target)
    before, *grad_scales = grad_out.split(plan.channels, dim=1)
    if not grad_scales:
        grad_image.copy_(before)
        return
    in_float32 = torch.empty_like(grad_image, dtype=torch.float32)
    grad_mixed, total = in_float32, torch.empty_like(in_float32) if len(grad_scales) > 1 else grad_image
    for i, grad in enumerate(grad_scales):
        scale = _Weights(image, weights, i)
        grads = [ts[i] if ts else None for ts in grad_weights]
        _scale_backward(plan, grad, image, scale, grads, grad_mixed)
        into = grad_image if i == len(grad_scales) - 1 else total
        options = target.options("multi_scale", "input_gradients", head_dim, CHUNK=plan.channels)
        programs = triton.cdiv(plan.channels, options["CHUNK"]) * triton.cdiv(plan.tokens, options["TOKENS"])
        _input_gradients[(programs * plan.batch,)](
            grad_mixed, scale.dw, before, into, plan.channels, plan.height, plan.width,
            *image_strides(grad_mixed), *image_strides(before), *image_strides(into),
            WHOLE=plan.channels % options["CHUNK"] == 0, **scale.options("KERNEL"), **options,
        )  # fmt: skip
        before = into


def _scale_backward(
    plan: _LaunchPlan,
    grad: torch.Tensor,
    image: torch.Tensor,
    scale: _Weights,
    grads: Sequence[torch.Tensor | None],
    grad_mixed: torch.Tensor,
) -> None:
    """Fills the gradients of a scale's weights, and ``grad_mixed`` with those between its convolutions."""
    grad_dw, grad_pw, grad_dw_bias, grad_pw_bias = grads
    options = plan.options("through_pointwise", whole_heads=False)
    chunks = triton.cdiv(plan.head_dim, options["CHUNK"])
    _through_pointwise[(chunks * triton.cdiv(plan.tokens, options["TOKENS"]) * plan.batch * plan.groups,)](
        grad, scale.pw, grad_mixed, plan.head_dim, plan.groups, plan.tokens,
        *image_strides(grad), *image_strides(grad_mixed), **options,
    )  # fmt: skip

    options = plan.options("pointwise_gradients")
    chunks = triton.cdiv(plan.head_dim, options["CHUNK"])
    part_tiles, count = split_tiles(chunks * plan.groups, plan.batch, plan.tokens, options["TOKENS"])
    partial, partial_bias = (new_partial(g, count) for g in (grad_pw, grad_pw_bias))
    _pointwise_gradients[(chunks * plan.groups * count,)](
        grad, image, scale.dw, scale.dw_bias, partial, image if partial_bias is None else partial_bias,
        plan.head_dim, plan.groups, plan.batch, plan.height, plan.width, part_tiles,
        *image_strides(grad), *image_strides(image), **scale.options(*_ALL), **options,
    )  # fmt: skip
    add_up_partial(partial, grad_pw)
    add_up_partial(partial_bias, grad_pw_bias)

    sizes, strides = tuple(image.shape), (image_strides(grad_mixed), image_strides(image))
    weight_gradients(grad_mixed, image, sizes, strides, grad_dw, grad_dw_bias, plan.target)


def attend_backward(results: Sequence[Any], grad_out: torch.Tensor, image: torch.Tensor, *rest: Any) -> None:
    """Fills the gradients of the image and of the weights."""
    *weights, kv_state, head_dim, eps, target = rest
    sizes = (image.shape[0], (1 + len(weights[0])) * image.shape[1], *image.shape[2:])
    memory_format = torch.channels_last if image_strides(image)[1] == 1 else torch.contiguous_format
    everything, grads = (
        torch.empty(sizes, dtype=torch.float32, device=image.device, memory_format=memory_format) for _ in range(2)
    )
    aggregate((everything,), image, *weights, head_dim, target)
    linear_attention.backward(
        heads_of(grads, head_dim),
        outputs_of(grad_out, head_dim),
        *heads_of(everything, head_dim),
        *(kv_state, eps, target),
    )
    del everything
    aggregate_backward(results, grads, image, *weights, head_dim, target)
