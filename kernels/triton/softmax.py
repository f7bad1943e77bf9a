"""Tiles of softmax attention with a bias, for kernels that say where its tensors begin.

All of it is summed in float32. A matrix of pairs (queries, keys) is addressed by its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effattn._triton.numerics import product
from effattn._triton.tiles import load_tile, store_tile


@triton.jit
def pairs_tile(
    a, token, tokens, a_token, a_channel, b, key, keys, b_token, b_channel, channels,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T of (tokens, channels) and (keys, channels)."""
    total = tl.zeros((token.shape[0], key.shape[0]), tl.float32)
    for first in range(0, channels, CHUNK):
        row = load_tile(a, token, tokens, a_token, first, CHUNK, channels, a_channel)
        col = load_tile(b, key, keys, b_token, first, CHUNK, channels, b_channel)
        total += product(row, tl.trans(col), PRECISION)
    return total


@triton.jit
def logits_tile(
    q, token, tokens, q_token, q_channel, k, key, keys, k_token, k_channel, head_dim, bias, scale,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale q k^T + bias; behind the last key -infinity."""
    pairs = pairs_tile(
        q, token, tokens, q_token, q_channel, k, key, keys, k_token, k_channel, head_dim, CHUNK, PRECISION
    )
    at = bias + token[:, None].to(tl.int64) * keys + key[None, :]
    inside = (token[:, None] < tokens) & (key[None, :] < keys)
    biased = scale * pairs + tl.load(at, mask=inside, other=0.0)
    return tl.where(key[None, :] < keys, biased, -float("inf"))


@triton.jit
def finite_or_zero(largest):
    """What is taken off logits: where all of them are -infinity, nothing, so that their exponentials are 0."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def attended_tile(
    q, token, tokens, q_token, q_channel, k, keys, k_token, k_channel, head_dim, bias, scale,
    v, v_token, v_channel, value, value_dim,
    KEYS: tl.constexpr, CHUNK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(scale q k^T + bias) v for DV channels of the values from ``value`` on, in one walk over the keys."""
    largest = tl.full((token.shape[0],), -float("inf"), tl.float32)
    weights = tl.zeros((token.shape[0],), tl.float32)
    total = tl.zeros((token.shape[0], DV), tl.float32)
    for first in range(0, keys, KEYS):
        key = first + tl.arange(0, KEYS)
        logits = logits_tile(
            q, token, tokens, q_token, q_channel, k, key, keys, k_token, k_channel, head_dim, bias, scale,
            CHUNK, PRECISION,
        )  # fmt: skip
        before, largest = largest, tl.maximum(largest, tl.max(logits, 1))
        base = finite_or_zero(largest)
        exponentials = tl.exp(logits - base[:, None])
        kept = tl.exp(before - base)
        weights = weights * kept + tl.sum(exponentials, 1)
        values = load_tile(v, key, keys, v_token, value, DV, value_dim, v_channel)
        total = total * kept[:, None] + product(exponentials, values, PRECISION)
    # Behind the last token all logits are 0, of which the weights are no 0.
    return total / weights[:, None]


@triton.jit
def softmax_gradients_tile(
    q, token, tokens, q_token, q_channel, k, keys, k_token, k_channel, head_dim, bias, scale,
    grad_out, g_token, g_channel, v, v_token, v_channel, value_dim, weights, grad_logits,
    KEYS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the softmax of a tile of queries, and the gradients of its logits, both (queries, keys) in float32."""
    largest = tl.full((token.shape[0],), -float("inf"), tl.float32)
    total = tl.zeros((token.shape[0],), tl.float32)
    along = tl.zeros((token.shape[0],), tl.float32)  # sum of weights times their gradients
    for first in range(0, keys, KEYS):
        key = first + tl.arange(0, KEYS)
        logits = logits_tile(
            q, token, tokens, q_token, q_channel, k, key, keys, k_token, k_channel, head_dim, bias, scale,
            CHUNK, PRECISION,
        )  # fmt: skip
        grad = pairs_tile(
            grad_out, token, tokens, g_token, g_channel, v, key, keys, v_token, v_channel, value_dim, CHUNK, PRECISION
        )
        before, largest = largest, tl.maximum(largest, tl.max(logits, 1))
        base = finite_or_zero(largest)
        exponentials = tl.exp(logits - base[:, None])
        kept = tl.exp(before - base)
        total = total * kept + tl.sum(exponentials, 1)
        along = along * kept + tl.sum(exponentials * grad, 1)
    base, along = finite_or_zero(largest), along / total
    for first in range(0, keys, KEYS):
        key = first + tl.arange(0, KEYS)
        logits = logits_tile(
            q, token, tokens, q_token, q_channel, k, key, keys, k_token, k_channel, head_dim, bias, scale,
            CHUNK, PRECISION,
        )  # fmt: skip
        grad = pairs_tile(
            grad_out, token, tokens, g_token, g_channel, v, key, keys, v_token, v_channel, value_dim, CHUNK, PRECISION
        )
        weight = tl.exp(logits - base[:, None]) / total[:, None]
        store_tile(weight, weights, token, tokens, keys, first, KEYS, keys, 1)
        store_tile(weight * (grad - along[:, None]), grad_logits, token, tokens, keys, first, KEYS, keys, 1)


@triton.jit
def product_tile(
    matrix, row, rows, row_stride, inners, inner_stride, x, x_token, x_channel, first, channels,
    INNER: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """matrix x: (rows, inners) by (inners, channels), of which CHUNK channels from ``first`` on."""
    total = tl.zeros((row.shape[0], CHUNK), tl.float32)
    for begin in range(0, inners, INNER):
        inner = begin + tl.arange(0, INNER)
        left = load_tile(matrix, row, rows, row_stride, begin, INNER, inners, inner_stride)
        right = load_tile(x, inner, inners, x_token, first, CHUNK, channels, x_channel)
        total += product(left, right, PRECISION)
    return total
