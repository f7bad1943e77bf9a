"""Heads x channels of a head, rows x columns of the image."""

from __future__ import annotations

SIZES = {
    f"4 x {d}, {side} x {side}": {
        "B": 1,
        "heads": 4,
        "d": d,
        "key_dim": 16,
        "H": side,
        "W": side,
        "k": (7, 5, 3, 3),
        "window_height": window,
        "window_width": window,
        "scale": 0.25,
    }
    for d, window, side in ((16, 4, 4), (32, 7, 14), (64, 7, 7), (96, 4, 4), (48, 7, 64))
}
