"""Biased attention with talking heads: two mixtures over the heads, before and after the softmax.

Logits, and what the softmax makes of them, are written in float32: each mixture needs those of all heads, and the
second one, the sums over all keys. In between a program holds all heads of some keys of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from effattn._triton import biased_attention
from effattn._triton.biased_attention import LaunchPlan
from effattn._triton.configs import MAX_TALKING_HEADS, PROGRAMS, Launch
from effattn._triton.layout import clear
from effattn._triton.numerics import TargetOptions
from effattn._triton.reduction import add_up
from effattn._triton.softmax import finite_or_zero

Tensors = Sequence[torch.Tensor]

#: By the number of heads.
LAUNCHES = {
    "talking_heads": {
        8: Launch(keys=64),
        16: Launch(keys=64),
        32: Launch(keys=32),
        MAX_TALKING_HEADS: Launch(keys=16, num_warps=8),
    }
}


@triton.jit
def _mixed(matrix, row_stride, col_stride, rows_at, head_stride, key, keys, heads, HEADS: tl.constexpr):
    """sum over h of matrix[g, h] rows[h]: (HEADS, keys); of the transposed matrix where its strides are swapped."""
    head = tl.arange(0, HEADS)
    total = tl.zeros((HEADS, key.shape[0]), tl.float32)
    for h in range(heads):
        row = tl.load(rows_at + h * head_stride + key, mask=key < keys, other=0.0)
        factor = tl.load(matrix + head * row_stride + h * col_stride, mask=head < heads, other=0.0)
        total += factor[:, None] * row[None, :]
    return total


@triton.jit
def _mixed_logits(logits, before, before_bias, head_stride, key, keys, heads, HEADS: tl.constexpr):
    head = tl.arange(0, HEADS)
    bias = tl.load(before_bias + head, mask=head < heads, other=0.0)
    mixed = _mixed(before, heads, 1, logits, head_stride, key, keys, heads, HEADS) + bias[:, None]
    return tl.where(key[None, :] < keys, mixed, -float("inf"))


@triton.jit
def _talking_heads(
    logits, before, before_bias, after, after_bias, weights,
    heads, tokens, keys,
    HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """From a query's logits its weights, of all heads: program (query, image)."""
    program = tl.program_id(0)
    batch, token, head_stride = program // tokens, program % tokens, tl.cast(tokens, tl.int64) * keys
    begin = (batch.to(tl.int64) * heads * tokens + token) * keys
    largest = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    for first in range(0, keys, KEYS):
        key = first + tl.arange(0, KEYS)
        mixed = _mixed_logits(logits + begin, before, before_bias, head_stride, key, keys, heads, HEADS)
        previous, largest = largest, tl.maximum(largest, tl.max(mixed, 1))
        base = finite_or_zero(largest)
        total = total * tl.exp(previous - base) + tl.sum(tl.exp(mixed - base[:, None]), 1)
    base, head = finite_or_zero(largest), tl.arange(0, HEADS)
    for first in range(0, keys, KEYS):
        key = first + tl.arange(0, KEYS)
        mixed = _mixed_logits(logits + begin, before, before_bias, head_stride, key, keys, heads, HEADS)
        softmax = tl.exp(mixed - base[:, None]) / total[:, None]
        for g in range(heads):
            factor = tl.load(after + g * heads + head, mask=head < heads, other=0.0)
            weight = tl.sum(factor[:, None] * softmax, 0) + tl.load(after_bias + g)
            tl.store(weights + begin + g * head_stride + key, weight, mask=key < keys)


@triton.jit
def _talking_heads_backward(
    logits, grad_weights, before, before_bias, after, after_bias, weights, grad_logits,
    grad_before, grad_before_bias, grad_after, grad_after_bias,
    heads, tokens, keys, queries, part_queries,
    HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The weights again, gradients of the logits, and sums for those of the mixtures: program (part of all queries)."""
    part = tl.program_id(0)
    head, head_stride = tl.arange(0, HEADS), tl.cast(tokens, tl.int64) * keys
    sum_before = tl.zeros((HEADS, HEADS), tl.float32)
    sum_before_bias = tl.zeros((HEADS,), tl.float32)
    sum_after = tl.zeros((HEADS, HEADS), tl.float32)
    sum_after_bias = tl.zeros((HEADS,), tl.float32)
    for query in range(part * part_queries, tl.minimum((part + 1) * part_queries, queries)):
        begin = ((query // tokens).to(tl.int64) * heads * tokens + query % tokens) * keys
        largest = tl.full((HEADS,), -float("inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        along = tl.zeros((HEADS,), tl.float32)  # sum of the softmax times its gradients
        for first in range(0, keys, KEYS):
            key = first + tl.arange(0, KEYS)
            mixed = _mixed_logits(logits + begin, before, before_bias, head_stride, key, keys, heads, HEADS)
            grad = _mixed(after, 1, heads, grad_weights + begin, head_stride, key, keys, heads, HEADS)
            previous, largest = largest, tl.maximum(largest, tl.max(mixed, 1))
            base = finite_or_zero(largest)
            exponentials, kept = tl.exp(mixed - base[:, None]), tl.exp(previous - base)
            total = total * kept + tl.sum(exponentials, 1)
            along = along * kept + tl.sum(exponentials * grad, 1)
        base, along = finite_or_zero(largest), along / total
        for first in range(0, keys, KEYS):
            key = first + tl.arange(0, KEYS)
            mixed = _mixed_logits(logits + begin, before, before_bias, head_stride, key, keys, heads, HEADS)
            grad = _mixed(after, 1, heads, grad_weights + begin, head_stride, key, keys, heads, HEADS)
            softmax = tl.exp(mixed - base[:, None]) / total[:, None]
            grad_mixed = softmax * (grad - along[:, None])
            sum_before_bias += tl.sum(grad_mixed, 1)
            for i in range(heads):
                at = begin + i * head_stride + key
                logit = tl.load(logits + at, mask=key < keys, other=0.0)
                grad_weight = tl.load(grad_weights + at, mask=key < keys, other=0.0)
                is_i = head == i
                column = tl.sum(grad_mixed * logit[None, :], 1)
                sum_before += tl.where(is_i[None, :], column[:, None], 0.0)
                row = tl.sum(softmax * grad_weight[None, :], 1)
                sum_after += tl.where(is_i[:, None], row[None, :], 0.0)
                sum_after_bias += tl.where(is_i, tl.sum(grad_weight, 0), 0.0)
                factor = tl.load(after + i * heads + head, mask=head < heads, other=0.0)
                weight = tl.sum(factor[:, None] * softmax, 0) + tl.load(after_bias + i)
                tl.store(weights + at, weight, mask=key < keys)
                factor = tl.load(before + head * heads + i, mask=head < heads, other=0.0)
                tl.store(grad_logits + at, tl.sum(factor[:, None] * grad_mixed, 0), mask=key < keys)
    at = part.to(tl.int64) * heads * heads + head[:, None] * heads + head[None, :]
    inside = (head[:, None] < heads) & (head[None, :] < heads)
    tl.store(grad_before + at, sum_before, mask=inside)
    tl.store(grad_after + at, sum_after, mask=inside)
    at = part.to(tl.int64) * heads + head
    tl.store(grad_before_bias + at, sum_before_bias, mask=head < heads)
    tl.store(grad_after_bias + at, sum_after_bias, mask=head < heads)


def _options(heads: int, target: TargetOptions) -> dict[str, Any]:
    options = target.options("biased_attention_talking_heads", "talking_heads", heads)
    return {"HEADS": triton.next_power_of_2(heads), **options}


def forward(results: Tensors, *arguments: Any) -> None:
    """Fills the output, with talking heads or without.

    Mixtures are weights (heads, heads) and biases (heads,), twice, contiguous in float32; or nothing.
    """
    q, k, v, bias, mixtures, scale, target = arguments
    (out,) = results
    if k.shape[2] == 0:
        clear(results)
        return
    if not mixtures:
        biased_attention.forward(results, q, k, v, bias, scale, target)
        return
    plan = LaunchPlan(q, k, v, target)
    logits = plan.pairs(q, k, bias, scale)
    weights = torch.empty_like(logits)
    _talking_heads[(plan.batch * plan.tokens,)](
        logits, *mixtures, weights, plan.heads, plan.tokens, plan.keys, **_options(plan.heads, target)
    )
    plan.multiply(weights, v, out)


def backward(grads: Sequence[Any], *arguments: Any) -> None:
    """Fills the gradients of q, k, v, the bias and the mixtures."""
    grad_out, q, k, v, bias, mixtures, scale, target = arguments
    *of_tensors, of_mixtures = grads
    if k.shape[2] == 0:
        clear(grads)
        return
    if not mixtures:
        biased_attention.backward(of_tensors, grad_out, q, k, v, bias, scale, target)
        return
    plan = LaunchPlan(q, k, v, target)
    logits, grad_weights = plan.pairs(q, k, bias, scale), plan.pairs(grad_out, v, None, 1.0)
    weights, grad_logits = torch.empty_like(logits), torch.empty_like(logits)
    queries = plan.batch * plan.tokens
    part_queries = triton.cdiv(queries, PROGRAMS)
    count = triton.cdiv(queries, part_queries)
    partial = [grad.new_empty(1, count, *grad.shape) for grad in of_mixtures]
    _talking_heads_backward[(count,)](
        logits, grad_weights, *mixtures, weights, grad_logits, *partial,
        plan.heads, plan.tokens, plan.keys, queries, part_queries, **_options(plan.heads, target),
    )  # fmt: skip
    for parts, grad in zip(partial, of_mixtures, strict=True):
        add_up(parts, grad)
    plan.multiply_gradients(weights, grad_logits, (q, k, grad_out), of_tensors, scale)
