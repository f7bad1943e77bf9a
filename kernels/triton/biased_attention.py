"""Softmax attention with a bias on the logits, forward and backward; with talking heads in a file of its own,
through which all are launched (biased_attention_talking_heads.py).

Without talking heads the forward is one launch. The backward writes the softmax and the gradients of its logits in
float32, which are added up over the batch for the bias's anyway, and multiplies with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from effattn._triton.configs import MAX_CHANNELS, Launch
from effattn._triton.numerics import TargetOptions
from effattn._triton.reduction import add_up
from effattn._triton.softmax import attended_tile, pairs_tile, product_tile, softmax_gradients_tile
from effattn._triton.tiles import load_tile, store_tile, tile_and_group

Tensors = Sequence[torch.Tensor]

LAUNCHES = {
    "attend": {MAX_CHANNELS: Launch(32, 32, keys=32)},
    "softmax_gradients": {MAX_CHANNELS: Launch(32, 32, keys=32)},
    "pairs": {MAX_CHANNELS: Launch(32, 32, keys=64)},
    "multiply": {MAX_CHANNELS: Launch(32, 32, keys=32)},
}


@triton.jit
def _head(base, batch, head, batch_stride, head_stride):
    return base + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def _attend(
    q, k, v, bias, out,
    heads, tokens, keys, head_dim, value_dim, scale,
    q_batch, q_head, q_token, q_channel, k_batch, k_head, k_token, k_channel,
    v_batch, v_head, v_token, v_channel, o_batch, o_head, o_token, o_channel,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DV channels of the output of a tile of queries: program (channels, tile, head, image)."""
    chunks = tl.cdiv(value_dim, DV)
    piece, group = tile_and_group(tl.cdiv(tokens, TOKENS) * chunks)
    token, value = piece // chunks * TOKENS + tl.arange(0, TOKENS), piece % chunks * DV
    batch, head = group // heads, group % heads
    total = attended_tile(
        _head(q, batch, head, q_batch, q_head), token, tokens, q_token, q_channel,
        _head(k, batch, head, k_batch, k_head), keys, k_token, k_channel, head_dim,
        bias + head.to(tl.int64) * tokens * keys, scale,
        _head(v, batch, head, v_batch, v_head), v_token, v_channel, value, value_dim,
        KEYS, CHUNK, DV, PRECISION,
    )  # fmt: skip
    begin = _head(out, batch, head, o_batch, o_head)
    store_tile(total, begin, token, tokens, o_token, value, DV, value_dim, o_channel)


@triton.jit
def _softmax_gradients(
    q, k, v, bias, grad_out, weights, grad_logits,
    heads, tokens, keys, head_dim, value_dim, scale,
    q_batch, q_head, q_token, q_channel, k_batch, k_head, k_token, k_channel,
    v_batch, v_head, v_token, v_channel, g_batch, g_head, g_token, g_channel,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax and the gradients of the logits of a tile of queries: program (tile, head, image)."""
    tile, group = tile_and_group(tl.cdiv(tokens, TOKENS))
    token = tile * TOKENS + tl.arange(0, TOKENS)
    batch, head = group // heads, group % heads
    pairs = group.to(tl.int64) * tokens * keys
    softmax_gradients_tile(
        _head(q, batch, head, q_batch, q_head), token, tokens, q_token, q_channel,
        _head(k, batch, head, k_batch, k_head), keys, k_token, k_channel, head_dim,
        bias + head.to(tl.int64) * tokens * keys, scale,
        _head(grad_out, batch, head, g_batch, g_head), g_token, g_channel,
        _head(v, batch, head, v_batch, v_head), v_token, v_channel, value_dim,
        weights + pairs, grad_logits + pairs, KEYS, CHUNK, PRECISION,
    )  # fmt: skip


@triton.jit
def _pairs(
    a, b, bias, out,
    heads, tokens, keys, channels, scale,
    a_batch, a_head, a_token, a_channel, b_batch, b_head, b_token, b_channel,
    BIAS: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of scale a b^T, and the bias if there is one: program (tile of keys, tile of tokens, head, image)."""
    key_tiles = tl.cdiv(keys, KEYS)
    piece, group = tile_and_group(tl.cdiv(tokens, TOKENS) * key_tiles)
    token, first = piece // key_tiles * TOKENS + tl.arange(0, TOKENS), piece % key_tiles * KEYS
    batch, head = group // heads, group % heads
    total = scale * pairs_tile(
        _head(a, batch, head, a_batch, a_head), token, tokens, a_token, a_channel,
        _head(b, batch, head, b_batch, b_head), first + tl.arange(0, KEYS), keys, b_token, b_channel, channels,
        CHUNK, PRECISION,
    )  # fmt: skip
    if BIAS:
        total += load_tile(bias + head.to(tl.int64) * tokens * keys, token, tokens, keys, first, KEYS, keys, 1)
    store_tile(total, out + group.to(tl.int64) * tokens * keys, token, tokens, keys, first, KEYS, keys, 1)


@triton.jit
def _multiply(
    matrix, x, out,
    heads, rows, inners, row_stride, inner_stride, channels, factor,
    x_batch, x_head, x_token, x_channel, o_batch, o_head, o_token, o_channel,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHUNK channels of factor matrix x for a tile of rows: program (channels, tile, head, image)."""
    chunks = tl.cdiv(channels, CHUNK)
    piece, group = tile_and_group(tl.cdiv(rows, TOKENS) * chunks)
    row, first = piece // chunks * TOKENS + tl.arange(0, TOKENS), piece % chunks * CHUNK
    batch, head = group // heads, group % heads
    total = factor * product_tile(
        matrix + group.to(tl.int64) * rows * inners, row, rows, row_stride, inners, inner_stride,
        _head(x, batch, head, x_batch, x_head), x_token, x_channel, first, channels, KEYS, CHUNK, PRECISION,
    )  # fmt: skip
    begin = _head(out, batch, head, o_batch, o_head)
    store_tile(total, begin, row, rows, o_token, first, CHUNK, channels, o_channel)


class LaunchPlan:
    """What the launches of a call share: q (B, heads, N, D), k (B, heads, M, D), v (B, heads, M, Dv)."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, target: TargetOptions) -> None:
        self.batch, self.heads, self.tokens, self.head_dim = q.shape
        self.keys, self.value_dim = k.shape[2], v.shape[3]
        self.target = target

    def new_pairs(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty((self.batch, self.heads, self.tokens, self.keys), dtype=torch.float32)

    def options(self, kernel: str, **chunked: int) -> dict[str, Any]:
        size, precision = max(self.head_dim, self.value_dim), self.target.precision
        return {**self.target.options("biased_attention", kernel, size, **chunked), "PRECISION": precision}

    def grid(self, tiles: int) -> tuple[int]:
        return (tiles * self.heads * self.batch,)

    def pairs(self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
        """scale a b^T + bias, (B, heads, N, M) in float32."""
        out, options = self.new_pairs(a), self.options("pairs", CHUNK=a.shape[3])
        tiles = triton.cdiv(self.tokens, options["TOKENS"]) * triton.cdiv(self.keys, options["KEYS"])
        _pairs[self.grid(tiles)](
            a, b, out if bias is None else bias, out, self.heads, self.tokens, self.keys, a.shape[3], scale,
            *a.stride(), *b.stride(), BIAS=bias is not None, **options,
        )  # fmt: skip
        return out

    def multiply(self, matrix: torch.Tensor, x: torch.Tensor, out: torch.Tensor, factor: float = 1.0) -> None:
        """Fills ``out`` with factor matrix x; the matrix (B, heads, rows, inners) is contiguous or its transpose is."""
        rows, inners = matrix.shape[2:]
        options = self.options("multiply", CHUNK=x.shape[3])
        tiles = triton.cdiv(rows, options["TOKENS"]) * triton.cdiv(x.shape[3], options["CHUNK"])
        _multiply[self.grid(tiles)](
            matrix, x, out, self.heads, rows, inners, *matrix.stride()[2:], x.shape[3], factor,
            *x.stride(), *out.stride(), **options,
        )  # fmt: skip

    def multiply_gradients(
        self,
        weights: torch.Tensor,
        grad_logits: torch.Tensor,
        tensors: Tensors,
        grads: Tensors,
        scale: float,
    ) -> None:
        """Gradients of q, k, v and the bias from ``tensors`` q, k and grad_out."""
        (q, k, grad_out), (grad_q, grad_k, grad_v, grad_bias) = tensors, grads
        self.multiply(grad_logits, k, grad_q, scale)
        self.multiply(grad_logits.mT, q, grad_k, scale)
        self.multiply(weights.mT, grad_out, grad_v)
        add_up(grad_logits.unsqueeze(0), grad_bias)


def forward(results: Tensors, *arguments: Any) -> None:
    """Fills the output (B, heads, N, Dv); the bias (heads, N, M) is contiguous, in float32."""
    q, k, v, bias, scale, target = arguments
    (out,) = results
    plan = LaunchPlan(q, k, v, target)
    options = plan.options("attend", CHUNK=plan.head_dim, DV=plan.value_dim)
    tiles = triton.cdiv(plan.tokens, options["TOKENS"]) * triton.cdiv(plan.value_dim, options["DV"])
    _attend[plan.grid(tiles)](
        q, k, v, bias, out, plan.heads, plan.tokens, plan.keys, plan.head_dim, plan.value_dim, scale,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(), **options,
    )  # fmt: skip


def backward(grads: Tensors, *arguments: Any) -> None:
    """Fills the gradients of q, k, v and the bias."""
    grad_out, q, k, v, bias, scale, target = arguments
    plan = LaunchPlan(q, k, v, target)
    weights, grad_logits = plan.new_pairs(q), plan.new_pairs(q)
    options = plan.options("softmax_gradients", CHUNK=max(plan.head_dim, plan.value_dim))
    _softmax_gradients[plan.grid(triton.cdiv(plan.tokens, options["TOKENS"]))](
        q, k, v, bias, grad_out, weights, grad_logits,
        plan.heads, plan.tokens, plan.keys, plan.head_dim, plan.value_dim, scale,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), **options,
    )  # fmt: skip
    plan.multiply_gradients(weights, grad_logits, (q, k, grad_out), grads, scale)
