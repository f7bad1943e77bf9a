"""Heads x queries x keys, of 32 channels and 128 of values."""

from __future__ import annotations

SIZES = {
    f"{heads} x {queries} x {keys}{', talking heads' if talking else ''}": {
        "B": 1,
        "heads": heads,
        "N": queries,
        "M": keys,
        "D": 32,
        "Dv": 128,
        "scale": 32**-0.5,
        "without": () if talking else ("talking_heads",),
    }
    for heads, queries, keys, talking in (
        (8, 49, 49, False),
        (8, 196, 196, False),
        (8, 1024, 1024, False),
        (8, 49, 49, True),
        (8, 196, 196, True),
    )
}
