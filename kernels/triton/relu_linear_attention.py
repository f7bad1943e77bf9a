"""ReLU linear attention, forward and backward.

The sums over the keys are split over programs, each of which writes its own; a second kernel adds them up in order, so
that nothing depends on which program is done first. What a query needs of them, sum v k^T and sum k, are Dv + 1 rows of
D numbers in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from effattn.kernels.configs import RELU_LINEAR_ATTENTION, Launch, padded, parts
from effattn.kernels.layout import Groups
from effattn.kernels.numerics import TargetOptions, narrowed, product, relu

_ADDED_UP = 1024  # numbers of a program of _add_up


@triton.jit
def _tile_and_group(tiles):
    """The program's; in one dimension of the grid, since the others end at 65535."""
    program = tl.program_id(0)
    return program % tiles, program // tiles


@triton.jit
def _group(base, group, size1, size2, stride0, stride1, stride2):
    """Where a group begins; groups are numbered over three dimensions, whose last two have these sizes."""
    outer, last = group // size2, group % size2
    return (
        base
        + (outer // size1).to(tl.int64) * stride0
        + (outer % size1).to(tl.int64) * stride1
        + last.to(tl.int64) * stride2
    )


@triton.jit
def _tile(begin, token, tokens, token_stride, first, CHANNELS: tl.constexpr, channels, channel_stride):
    """Pointers to (tokens, CHANNELS) from channel ``first`` on, and which of them are inside."""
    channel = first + tl.arange(0, CHANNELS)
    at = begin + token[:, None].to(tl.int64) * token_stride + channel[None, :].to(tl.int64) * channel_stride
    return at, (token[:, None] < tokens) & (channel[None, :] < channels)


@triton.jit
def _load(begin, token, tokens, token_stride, first, CHANNELS: tl.constexpr, channels, channel_stride):
    at, inside = _tile(begin, token, tokens, token_stride, first, CHANNELS, channels, channel_stride)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(x, begin, token, tokens, token_stride, first, CHANNELS: tl.constexpr, channels, channel_stride):
    at, inside = _tile(begin, token, tokens, token_stride, first, CHANNELS, channels, channel_stride)
    tl.store(at, narrowed(x, begin.dtype.element_ty), mask=inside)


@triton.jit
def _matrix(sums, group, value, head_dim, value_dim, D: tl.constexpr, DV: tl.constexpr):
    """Pointers to rows (DV, D) of sum v k^T from ``value`` on, and which of them there are."""
    row, col = value + tl.arange(0, DV)[:, None], tl.arange(0, D)[None, :]
    at = sums + group.to(tl.int64) * (value_dim + 1) * head_dim + row * head_dim + col
    return at, (row < value_dim) & (col < head_dim)


@triton.jit
def _load_matrix(sums, group, value, head_dim, value_dim, D: tl.constexpr, DV: tl.constexpr):
    at, inside = _matrix(sums, group, value, head_dim, value_dim, D, DV)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _vector(sums, group, head_dim, value_dim, D: tl.constexpr):
    """Pointers to sum k (D,), which stands behind the matrix, and which of them there are."""
    col = tl.arange(0, D)
    return sums + (group.to(tl.int64) * (value_dim + 1) + value_dim) * head_dim + col, col < head_dim


@triton.jit
def _load_vector(sums, group, head_dim, value_dim, D: tl.constexpr):
    at, inside = _vector(sums, group, head_dim, value_dim, D)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _divisible(denominator):
    """Subnormal ones, whose inverse float32 may not hold, count as 2^-126: zero times infinity would be NaN."""
    return tl.where(denominator > 0, tl.maximum(denominator, 1.1754943508222875e-38), denominator)


@triton.jit
def _sum_tokens(
    k, v, scales, sums,
    tokens, head_dim, value_dim, count, part_tokens,
    size1, size2,
    k0, k1, k2, k_token, k_channel,
    v0, v1, v2, v_token, v_channel,
    SCALED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DV rows of sum v relu(k)^T, and sum relu(k), over a part of the tokens: program (rows, part, group).

    If SCALED, each token of them times its scales, (groups, tokens, 2).
    """
    rows = tl.cdiv(value_dim, DV)
    piece, group = _tile_and_group(rows * count)
    part, value = piece // rows, piece % rows * DV
    k_begin = _group(k, group, size1, size2, k0, k1, k2)
    v_begin = _group(v, group, size1, size2, v0, v1, v2)
    end = tl.minimum((part + 1) * part_tokens, tokens)
    matrix = tl.zeros((DV, D), tl.float32)
    keys = tl.zeros((TOKENS, D), tl.float32)
    for first in range(part * part_tokens, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        key = relu(_load(k_begin, token, end, k_token, 0, D, head_dim, k_channel))
        values = _load(v_begin, token, end, v_token, value, DV, value_dim, v_channel)
        if SCALED:
            scale = scales + (group.to(tl.int64) * tokens + token) * 2
            keys += key.to(tl.float32) * tl.load(scale + 1, mask=token < end, other=0.0)[:, None]
            # Not of v: where k is zero its scale may be so large that v times it is infinite.
            key = key.to(tl.float32) * tl.load(scale, mask=token < end, other=0.0)[:, None]
        else:
            keys += key.to(tl.float32)
        matrix += product(tl.trans(values), key, PRECISION)
    at, inside = _matrix(sums, group * count + part, value, head_dim, value_dim, D, DV)
    tl.store(at, matrix, mask=inside)
    at, inside = _vector(sums, group * count + part, head_dim, value_dim, D)
    first_only = tl.arange(0, D) < tl.where(value == 0, head_dim, 0)
    tl.store(at, tl.sum(keys, 0), mask=inside & first_only)


@triton.jit
def _add_up(partial, sums, count, floats, COUNT: tl.constexpr):
    """The partial sums of each group, (count, floats), one after the other: program (piece of floats, group)."""
    piece, group = _tile_and_group(tl.cdiv(floats, COUNT))
    at = piece * COUNT + tl.arange(0, COUNT)
    inside = at < floats
    total = tl.zeros((COUNT,), tl.float32)
    for part in range(count):
        total += tl.load(partial + (group.to(tl.int64) * count + part) * floats + at, mask=inside, other=0.0)
    tl.store(sums + group.to(tl.int64) * floats + at, total, mask=inside)


@triton.jit
def _attend(
    q, sums, out,
    tokens, head_dim, value_dim, eps,
    size1, size2,
    q0, q1, q2, q_token, q_channel,
    o0, o1, o2, o_token, o_channel,
    D: tl.constexpr, DV: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of a tile of queries: program (tile, group)."""
    tile, group = _tile_and_group(tl.cdiv(tokens, TOKENS))
    token = tile * TOKENS + tl.arange(0, TOKENS)
    q_begin = _group(q, group, size1, size2, q0, q1, q2)
    query = relu(_load(q_begin, token, tokens, q_token, 0, D, head_dim, q_channel)).to(tl.float32)
    keys = _load_vector(sums, group, head_dim, value_dim, D)
    denominator = _divisible(tl.sum(query * keys[None, :], 1) + eps)
    o_begin = _group(out, group, size1, size2, o0, o1, o2)
    for value in range(0, value_dim, DV):
        matrix = _load_matrix(sums, group, value, head_dim, value_dim, D, DV)
        numerator = product(query, tl.trans(matrix), PRECISION)
        _store(numerator / denominator[:, None], o_begin, token, tokens, o_token, value, DV, value_dim, o_channel)


@triton.jit
def _query_gradients(
    q, grad_out, sums, grad_q, scales,
    tokens, head_dim, value_dim, eps,
    size1, size2,
    q0, q1, q2, q_token, q_channel,
    g0, g1, g2, g_token, g_channel,
    d0, d1, d2, d_token, d_channel,
    D: tl.constexpr, DV: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q of a tile of queries, and by what the sums' gradients take each of them: program (tile, group)."""
    tile, group = _tile_and_group(tl.cdiv(tokens, TOKENS))
    token = tile * TOKENS + tl.arange(0, TOKENS)
    q_begin = _group(q, group, size1, size2, q0, q1, q2)
    query = relu(_load(q_begin, token, tokens, q_token, 0, D, head_dim, q_channel)).to(tl.float32)
    keys = _load_vector(sums, group, head_dim, value_dim, D)
    # Tokens behind the last would divide by eps, which may be 0.
    denominator = _divisible(tl.where(token < tokens, tl.sum(query * keys[None, :], 1) + eps, 1.0))
    g_begin = _group(grad_out, group, size1, size2, g0, g1, g2)
    of_sums = tl.zeros((TOKENS, D), tl.float32)
    for value in range(0, value_dim, DV):
        grad = _load(g_begin, token, tokens, g_token, value, DV, value_dim, g_channel).to(tl.float32)
        of_sums += product(grad, _load_matrix(sums, group, value, head_dim, value_dim, D, DV), PRECISION)
    inverse = 1 / denominator
    # -grad . out, with out = relu(q) . sums / denominator.
    along = -tl.sum(query * of_sums, 1) * inverse
    # The gate is relu's, which lets NaN through.
    grad_query = tl.where(query <= 0, 0.0, (of_sums + along[:, None] * keys[None, :]) * inverse[:, None])
    d_begin = _group(grad_q, group, size1, size2, d0, d1, d2)
    _store(grad_query, d_begin, token, tokens, d_token, 0, D, head_dim, d_channel)
    scale = scales + (group.to(tl.int64) * tokens + token) * 2
    tl.store(scale, inverse, mask=token < tokens)
    tl.store(scale + 1, along * inverse, mask=token < tokens)


@triton.jit
def _key_gradients(
    k, v, grad_sums, grad_k, grad_v,
    tokens, head_dim, value_dim,
    size1, size2,
    k0, k1, k2, k_token, k_channel,
    v0, v1, v2, v_token, v_channel,
    a0, a1, a2, a_token, a_channel,
    b0, b1, b2, b_token, b_channel,
    D: tl.constexpr, DV: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k (a) and grad_v (b) of a tile of keys: program (tile, group)."""
    tile, group = _tile_and_group(tl.cdiv(tokens, TOKENS))
    token = tile * TOKENS + tl.arange(0, TOKENS)
    v_begin = _group(v, group, size1, size2, v0, v1, v2)
    grad_key = tl.zeros((TOKENS, D), tl.float32) + _load_vector(grad_sums, group, head_dim, value_dim, D)[None, :]
    for value in range(0, value_dim, DV):
        values = _load(v_begin, token, tokens, v_token, value, DV, value_dim, v_channel).to(tl.float32)
        grad_key += product(values, _load_matrix(grad_sums, group, value, head_dim, value_dim, D, DV), PRECISION)
    k_begin = _group(k, group, size1, size2, k0, k1, k2)
    key = relu(_load(k_begin, token, tokens, k_token, 0, D, head_dim, k_channel)).to(tl.float32)
    grad_key = tl.where(key <= 0, 0.0, grad_key)
    a_begin = _group(grad_k, group, size1, size2, a0, a1, a2)
    _store(grad_key, a_begin, token, tokens, a_token, 0, D, head_dim, a_channel)
    # A loop of its own: both products at once want more registers than there are.
    b_begin = _group(grad_v, group, size1, size2, b0, b1, b2)
    for value in range(0, value_dim, DV):
        matrix = _load_matrix(grad_sums, group, value, head_dim, value_dim, D, DV)
        grad_value = product(key, tl.trans(matrix), PRECISION)
        _store(grad_value, b_begin, token, tokens, b_token, value, DV, value_dim, b_channel)


class _Call:
    """What the launches of a call share."""

    def __init__(self, q: torch.Tensor, v: torch.Tensor, groups: Groups, target: TargetOptions) -> None:
        self.groups, self.head_dim, self.value_dim = groups, q.shape[-1], v.shape[-1]
        self._shared = {"D": padded(self.head_dim), "PRECISION": target.precision, **target.launch}

    def launch(self, kernel: str) -> Launch:
        return RELU_LINEAR_ATTENTION[kernel][padded(self.head_dim)]

    def options(self, launch: Launch) -> dict[str, Any]:
        return {**self._shared, **launch.options(self.value_dim)}

    def strides(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        return (*self.groups.sizes, *(stride for t in tensors for stride in self.groups.strides(t)))

    def sum_tokens(self, k: torch.Tensor, v: torch.Tensor, scales: torch.Tensor | None, sums: torch.Tensor) -> None:
        """Fills ``sums``, in parts whose number is a function of the sizes."""
        launch, tokens, groups = self.launch("sum_tokens"), k.shape[-2], self.groups.count
        part_tokens = -(-tokens // parts(groups, tokens))
        part_tokens = -(-part_tokens // launch.tokens) * launch.tokens
        count = max(1, -(-tokens // max(part_tokens, 1)))
        floats = (self.value_dim + 1) * self.head_dim
        partial = sums if count == 1 else sums.new_empty(groups, count, floats)
        options = self.options(launch)
        rows = triton.cdiv(self.value_dim, options["DV"])
        _sum_tokens[(rows * count * groups,)](
            k, v, sums if scales is None else scales, partial,
            tokens, self.head_dim, self.value_dim, count, part_tokens, *self.strides(k, v),
            SCALED=scales is not None, **options,
        )  # fmt: skip
        if count > 1:
            grid = (triton.cdiv(floats, _ADDED_UP) * groups,)
            _add_up[grid](partial, sums, count, floats, COUNT=_ADDED_UP, num_warps=4)

    def tiles_of(self, launch: Launch, tokens: int) -> tuple[int]:
        """The grid of a program for each tile of each group."""
        return (triton.cdiv(tokens, launch.tokens) * self.groups.count,)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sums: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    target: TargetOptions,
) -> None:
    """Fills ``sums`` (..., Dv + 1, D), contiguous, and ``out`` (..., N, Dv)."""
    call = _Call(q, v, Groups.of(q, k, v, out), target)
    call.sum_tokens(k, v, None, sums)
    launch, queries = call.launch("attend"), q.shape[-2]
    if queries > 0:
        _attend[call.tiles_of(launch, queries)](
            q, sums, out, queries, call.head_dim, call.value_dim, eps, *call.strides(q, out),
            **call.options(launch),
        )  # fmt: skip


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sums: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    eps: float,
    target: TargetOptions,
) -> None:
    """Fills the gradients of q, k and v."""
    call = _Call(q, v, Groups.of(grad_out, q, k, v, *grads), target)
    (grad_q, grad_k, grad_v), queries, keys = grads, q.shape[-2], k.shape[-2]
    scales = sums.new_empty(call.groups.count, queries, 2)
    launch = call.launch("query_gradients")
    if queries > 0:
        _query_gradients[call.tiles_of(launch, queries)](
            q, grad_out, sums, grad_q, scales, queries, call.head_dim, call.value_dim, eps,
            *call.strides(q, grad_out, grad_q), **call.options(launch),
        )  # fmt: skip
    grad_sums = torch.empty_like(sums)
    call.sum_tokens(q, grad_out, scales, grad_sums)
    launch = call.launch("key_gradients")
    if keys > 0:
        _key_gradients[call.tiles_of(launch, keys)](
            k, v, grad_sums, grad_k, grad_v, keys, call.head_dim, call.value_dim,
            *call.strides(k, v, grad_k, grad_v), **call.options(launch),
        )  # fmt: skip
