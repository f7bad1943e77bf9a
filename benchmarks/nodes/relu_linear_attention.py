"""Heads x tokens x channels of a head."""

from __future__ import annotations

SIZES = {
    f"{heads} x {tokens} x {dim}": {"...": (1, heads), "N": tokens, "M": tokens, "D": dim, "Dv": dim, "eps": 1e-5}
    for heads, tokens, dim in ((1, 1, 16), (8, 49, 16), (16, 196, 16), (70, 1024, 32), (8, 32768, 16), (64, 49, 128))
}
