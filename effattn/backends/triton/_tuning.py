"""Whether launches are looked for on the GPU at hand: if ``EFFATTN_TRITON_AUTOTUNE`` names a file to keep them in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from effattn.backends.triton._launch import gpu_name

ENVIRONMENT_VARIABLE = "EFFATTN_TRITON_AUTOTUNE"

_file: Path | None = None
_seen: set[Any] = set()


def is_on() -> bool:
    return ENVIRONMENT_VARIABLE in os.environ


def before(name: str, kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Of a call with sizes that have not been seen: looks for launches, and keeps them.

    Raises:
        ValueError: if the file is one of something else.
    """
    global _file
    from effattn._triton import autotune

    if _file is None:
        _file = Path(os.environ[ENVIRONMENT_VARIABLE])
        if _file.exists():
            autotune.read(_file)
    first = arguments[0]
    if not first.is_cuda or torch.cuda.is_current_stream_capturing():
        return
    key = (name, first.device, *_signature(arguments))
    if key not in _seen:
        _seen.add(key)
        with torch.cuda.device(first.device):
            if autotune.tune(lambda: kernel(*arguments), gpu_name(first.device), _seconds):
                autotune.write(_file)


def _signature(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes, memory orders and types."""
    return tuple(
        (a.shape, a.stride(), a.dtype)
        if isinstance(a, torch.Tensor)
        else _signature(tuple(a))
        if isinstance(a, (list, tuple))
        else a
        for a in arguments
    )


def _seconds(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench_cudagraph

    call()  # compiles, outside of the graph
    return float(do_bench_cudagraph(call, rep=20, return_mode="median")) / 1e3
