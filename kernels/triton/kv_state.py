"""The kv_state of linear attention in memory: S, transposed, and below it z, (Dv + 1, D) in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matrix_pointers(kv_state, group, value, first, head_dim, value_dim, D: tl.constexpr, DV: tl.constexpr):
    """Pointers to (DV, D) of sum v k^T from row ``value`` and column ``first`` on, and which of them there are."""
    row, col = value + tl.arange(0, DV)[:, None], first + tl.arange(0, D)[None, :]
    at = kv_state + group.to(tl.int64) * (value_dim + 1) * head_dim + row * head_dim + col
    return at, (row < value_dim) & (col < head_dim)


@triton.jit
def load_matrix(kv_state, group, value, first, head_dim, value_dim, D: tl.constexpr, DV: tl.constexpr):
    at, inside = matrix_pointers(kv_state, group, value, first, head_dim, value_dim, D, DV)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def vector_pointers(kv_state, group, first, head_dim, value_dim, D: tl.constexpr):
    """Pointers to sum k (D,) from ``first`` on, which stands behind the matrix, and which of them there are."""
    col = first + tl.arange(0, D)
    return kv_state + (group.to(tl.int64) * (value_dim + 1) + value_dim) * head_dim + col, col < head_dim


@triton.jit
def load_vector(kv_state, group, first, head_dim, value_dim, D: tl.constexpr):
    at, inside = vector_pointers(kv_state, group, first, head_dim, value_dim, D)
    return tl.load(at, mask=inside, other=0.0)
