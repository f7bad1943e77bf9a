"""Heads x rows x columns x channels of a head, with one branch of 5x5 or none."""

from __future__ import annotations

SIZES = {
    f"{heads} x {height} x {width} x {dim}{'' if kernels else ', no branch'}": {
        "B": 1,
        "heads": heads,
        "head_dim": dim,
        "S": len(kernels),
        "k": kernels,
        "H": height,
        "W": width,
        "eps": 1e-5,
        "without": ("dw_biases", "pw_biases"),
    }
    for heads, dim, kernels, height, width in (
        (1, 16, (5,), 1, 1),
        (4, 16, (5,), 4, 4),
        (8, 16, (5,), 14, 14),
        (8, 32, (5,), 7, 7),
        (32, 32, (), 16, 16),
        (16, 16, (5,), 64, 128),
    )
}
