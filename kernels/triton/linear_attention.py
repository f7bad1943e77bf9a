"""ReLU linear attention, forward and backward, by itself and in the heads of multi-scale attention.

The keys are split over programs, each of which writes a kv_state of its own; a second kernel adds them up in order, so
that nothing depends on which program is done first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from effattn._triton.configs import Launch, padded, split
from effattn._triton.kv_state import load_matrix, load_vector, matrix_pointers, vector_pointers
from effattn._triton.layout import Groups, clear
from effattn._triton.numerics import TargetOptions, clamp_subnormal, product, relu
from effattn._triton.reduction import add_up
from effattn._triton.tiles import group_begin, load_tile, store_tile, tile_and_group

Tensors = Sequence[torch.Tensor]

LAUNCHES = {
    "sum_tokens": {16: Launch(64, 32), 32: Launch(32, 32), 64: Launch(32, 16), 128: Launch(16, 16)},
    "attend": {16: Launch(128, 32), 32: Launch(128, 32), 64: Launch(64, 16), 128: Launch(32, 16)},
    "query_gradients": {16: Launch(128, 32), 32: Launch(32, 32), 64: Launch(32, 16), 128: Launch(32, 16)},
    "key_gradients": {16: Launch(128, 32), 32: Launch(64, 32), 64: Launch(64, 16), 128: Launch(32, 16)},
}


@triton.jit
def _accumulate_kv_state(
    k, v, scales, kv_state,
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
    piece, group = tile_and_group(rows * count)
    part, value = piece // rows, piece % rows * DV
    k_begin = group_begin(k, group, size1, size2, k0, k1, k2)
    v_begin = group_begin(v, group, size1, size2, v0, v1, v2)
    end = tl.minimum((part + 1) * part_tokens, tokens)
    matrix = tl.zeros((DV, D), tl.float32)
    keys = tl.zeros((TOKENS, D), tl.float32)
    for first in range(part * part_tokens, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        key = relu(load_tile(k_begin, token, end, k_token, 0, D, head_dim, k_channel))
        values = load_tile(v_begin, token, end, v_token, value, DV, value_dim, v_channel)
        if SCALED:
            scale = scales + (group.to(tl.int64) * tokens + token) * 2
            keys += key.to(tl.float32) * tl.load(scale + 1, mask=token < end, other=0.0)[:, None]
            # Not of v: where k is zero its scale may be so large that v times it is infinite.
            key = key.to(tl.float32) * tl.load(scale, mask=token < end, other=0.0)[:, None]
        else:
            keys += key.to(tl.float32)
        matrix += product(tl.trans(values), key, PRECISION)
    at, inside = matrix_pointers(kv_state, group * count + part, value, 0, head_dim, value_dim, D, DV)
    tl.store(at, matrix, mask=inside)
    at, inside = vector_pointers(kv_state, group * count + part, 0, head_dim, value_dim, D)
    first_only = tl.arange(0, D) < tl.where(value == 0, head_dim, 0)
    tl.store(at, tl.sum(keys, 0), mask=inside & first_only)


@triton.jit
def _attend(
    q, kv_state, out,
    tokens, head_dim, value_dim, eps,
    size1, size2,
    q0, q1, q2, q_token, q_channel,
    o0, o1, o2, o_token, o_channel,
    D: tl.constexpr, DV: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of a tile of queries: program (tile, group)."""
    tile, group = tile_and_group(tl.cdiv(tokens, TOKENS))
    token = tile * TOKENS + tl.arange(0, TOKENS)
    q_begin = group_begin(q, group, size1, size2, q0, q1, q2)
    query = relu(load_tile(q_begin, token, tokens, q_token, 0, D, head_dim, q_channel)).to(tl.float32)
    keys = load_vector(kv_state, group, 0, head_dim, value_dim, D)
    denominator = clamp_subnormal(tl.sum(query * keys[None, :], 1) + eps)
    o_begin = group_begin(out, group, size1, size2, o0, o1, o2)
    for value in range(0, value_dim, DV):
        matrix = load_matrix(kv_state, group, value, 0, head_dim, value_dim, D, DV)
        numerator = product(query, tl.trans(matrix), PRECISION)
        store_tile(numerator / denominator[:, None], o_begin, token, tokens, o_token, value, DV, value_dim, o_channel)


@triton.jit
def _query_gradients(
    q, grad_out, kv_state, grad_q, scales,
    tokens, head_dim, value_dim, eps,
    size1, size2,
    q0, q1, q2, q_token, q_channel,
    g0, g1, g2, g_token, g_channel,
    d0, d1, d2, d_token, d_channel,
    D: tl.constexpr, DV: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q of a tile of queries, and by what the kv_state's gradients take each of them: program (tile, group)."""
    tile, group = tile_and_group(tl.cdiv(tokens, TOKENS))
    token = tile * TOKENS + tl.arange(0, TOKENS)
    q_begin = group_begin(q, group, size1, size2, q0, q1, q2)
    query = relu(load_tile(q_begin, token, tokens, q_token, 0, D, head_dim, q_channel)).to(tl.float32)
    keys = load_vector(kv_state, group, 0, head_dim, value_dim, D)
    # Tokens behind the last would divide by eps, which may be 0.
    denominator = clamp_subnormal(tl.where(token < tokens, tl.sum(query * keys[None, :], 1) + eps, 1.0))
    g_begin = group_begin(grad_out, group, size1, size2, g0, g1, g2)
    total = tl.zeros((TOKENS, D), tl.float32)
    for value in range(0, value_dim, DV):
        grad = load_tile(g_begin, token, tokens, g_token, value, DV, value_dim, g_channel).to(tl.float32)
        total += product(grad, load_matrix(kv_state, group, value, 0, head_dim, value_dim, D, DV), PRECISION)
    inverse = 1 / denominator
    # -grad . out, with out = relu(q) S / denominator.
    along = -tl.sum(query * total, 1) * inverse
    # The gate is relu's, which lets NaN through.
    grad_query = tl.where(query <= 0, 0.0, (total + along[:, None] * keys[None, :]) * inverse[:, None])
    d_begin = group_begin(grad_q, group, size1, size2, d0, d1, d2)
    store_tile(grad_query, d_begin, token, tokens, d_token, 0, D, head_dim, d_channel)
    scale = scales + (group.to(tl.int64) * tokens + token) * 2
    tl.store(scale, inverse, mask=token < tokens)
    tl.store(scale + 1, along * inverse, mask=token < tokens)


@triton.jit
def _key_gradients(
    k, v, grad_kv_state, grad_k, grad_v,
    tokens, head_dim, value_dim,
    size1, size2,
    k0, k1, k2, k_token, k_channel,
    v0, v1, v2, v_token, v_channel,
    a0, a1, a2, a_token, a_channel,
    b0, b1, b2, b_token, b_channel,
    D: tl.constexpr, DV: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k (a) and grad_v (b) of a tile of keys: program (tile, group)."""
    tile, group = tile_and_group(tl.cdiv(tokens, TOKENS))
    token = tile * TOKENS + tl.arange(0, TOKENS)
    v_begin = group_begin(v, group, size1, size2, v0, v1, v2)
    grad_key = tl.zeros((TOKENS, D), tl.float32) + load_vector(grad_kv_state, group, 0, head_dim, value_dim, D)[None, :]
    for value in range(0, value_dim, DV):
        values = load_tile(v_begin, token, tokens, v_token, value, DV, value_dim, v_channel).to(tl.float32)
        grad_key += product(values, load_matrix(grad_kv_state, group, value, 0, head_dim, value_dim, D, DV), PRECISION)
    k_begin = group_begin(k, group, size1, size2, k0, k1, k2)
    key = relu(load_tile(k_begin, token, tokens, k_token, 0, D, head_dim, k_channel)).to(tl.float32)
    grad_key = tl.where(key <= 0, 0.0, grad_key)
    a_begin = group_begin(grad_k, group, size1, size2, a0, a1, a2)
    store_tile(grad_key, a_begin, token, tokens, a_token, 0, D, head_dim, a_channel)
    # A loop of its own: both products at once want more registers than there are.
    b_begin = group_begin(grad_v, group, size1, size2, b0, b1, b2)
    for value in range(0, value_dim, DV):
        matrix = load_matrix(grad_kv_state, group, value, 0, head_dim, value_dim, D, DV)
        grad_value = product(key, tl.trans(matrix), PRECISION)
        store_tile(grad_value, b_begin, token, tokens, b_token, value, DV, value_dim, b_channel)


class _LaunchPlan:
    """What the launches of a call share."""

    def __init__(self, q: torch.Tensor, v: torch.Tensor, groups: Groups, target: TargetOptions) -> None:
        self.groups, self.head_dim, self.value_dim = groups, q.shape[-1], v.shape[-1]
        self._target = target
        self._shared = {"D": padded(self.head_dim), "PRECISION": target.precision}

    def options(self, kernel: str) -> dict[str, Any]:
        options = self._target.options("linear_attention", kernel, self.head_dim, DV=self.value_dim)
        return {**self._shared, **options}

    def strides(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        return (*self.groups.sizes, *(stride for t in tensors for stride in self.groups.strides(t)))

    def accumulate(self, k: torch.Tensor, v: torch.Tensor, scales: torch.Tensor | None, kv_state: torch.Tensor) -> None:
        """Fills ``kv_state``, in parts whose number is a function of the sizes."""
        options, tokens, groups = self.options("sum_tokens"), k.shape[-2], self.groups.count
        part_tokens, count = split(groups, tokens, options["TOKENS"])
        floats = (self.value_dim + 1) * self.head_dim
        partial = kv_state if count == 1 else kv_state.new_empty(groups, count, floats)
        rows = triton.cdiv(self.value_dim, options["DV"])
        _accumulate_kv_state[(rows * count * groups,)](
            k, v, kv_state if scales is None else scales, partial,
            tokens, self.head_dim, self.value_dim, count, part_tokens, *self.strides(k, v),
            SCALED=scales is not None, **options,
        )  # fmt: skip
        if count > 1:
            add_up(partial, kv_state)

    def tiles_of(self, options: dict[str, Any], tokens: int) -> tuple[int]:
        """The grid of a program for each tile of each group."""
        return (triton.cdiv(tokens, options["TOKENS"]) * self.groups.count,)


def forward(
    results: Tensors, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, target: TargetOptions
) -> None:
    """Fills the output (..., N, Dv) and the kv_state (..., Dv + 1, D), which is contiguous."""
    out, kv_state = results
    if q.shape[-1] == 0:  # 0 / (0 + eps)
        out.fill_(0.0 if eps > 0 else math.nan)
        return
    groups = Groups.of(q, k, v, out)
    if not groups.are_addressable:
        into = out.new_empty(out.shape)
        forward((into, kv_state), q.contiguous(), k.contiguous(), v.contiguous(), eps, target)
        out.copy_(into)
        return
    plan = _LaunchPlan(q, v, groups, target)
    plan.accumulate(k, v, None, kv_state)
    options, queries = plan.options("attend"), q.shape[-2]
    if queries > 0:
        _attend[plan.tiles_of(options, queries)](
            q, kv_state, out, queries, plan.head_dim, plan.value_dim, eps, *plan.strides(q, out),
            **options,
        )  # fmt: skip


def backward(grads: Tensors, *arguments: Any) -> None:
    """Fills the gradients of q, k and v."""
    grad_out, q, k, v, kv_state, eps, target = arguments
    if q.shape[-1] == 0:
        clear(grads)
        return
    groups = Groups.of(grad_out, q, k, v, *grads)
    if not groups.are_addressable:
        into = [grad.new_empty(grad.shape) for grad in grads]
        backward(into, *(t.contiguous() for t in (grad_out, q, k, v)), kv_state, eps, target)
        for grad, written in zip(grads, into, strict=True):
            grad.copy_(written)
        return
    plan = _LaunchPlan(q, v, groups, target)
    (grad_q, grad_k, grad_v), queries, keys = grads, q.shape[-2], k.shape[-2]
    scales = kv_state.new_empty(plan.groups.count, queries, 2)
    options = plan.options("query_gradients")
    if queries > 0:
        _query_gradients[plan.tiles_of(options, queries)](
            q, grad_out, kv_state, grad_q, scales, queries, plan.head_dim, plan.value_dim, eps,
            *plan.strides(q, grad_out, grad_q), **options,
        )  # fmt: skip
    grad_kv_state = torch.empty_like(kv_state)
    plan.accumulate(q, grad_out, scales, grad_kv_state)
    options = plan.options("key_gradients")
    if keys > 0:
        _key_gradients[plan.tiles_of(options, keys)](
            k, v, grad_kv_state, grad_k, grad_v, keys, plan.head_dim, plan.value_dim,
            *plan.strides(k, v, grad_k, grad_v), **options,
        )  # fmt: skip
