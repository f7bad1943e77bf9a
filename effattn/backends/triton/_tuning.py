"""Whether launches are looked for on the GPU at hand: if ``EFFATTN_TRITON_AUTOTUNE`` names a file to keep them in."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from effattn._cache import BoundedCache

ENVIRONMENT_VARIABLE = "EFFATTN_TRITON_AUTOTUNE"

_file: Path | None = None
_seen: BoundedCache[Any, None] = BoundedCache()


def is_on() -> bool:
    return bool(os.environ.get(ENVIRONMENT_VARIABLE))


@cache
def gpu_name(device: torch.device) -> str:
    """The name under which launches are kept; none of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def before(launcher: Callable[..., None], device: torch.device, given: tuple[Any, ...]) -> None:
    """Of a launch with sizes that have not been seen: looks for faster ones, and keeps them.

    Args:
        given: to the launcher, which may be called any number of times with it.

    Raises:
        ValueError: if the file is one of something else.
    """
    global _file
    from effattn._triton import autotune

    if _file is None:
        file = Path(os.environ[ENVIRONMENT_VARIABLE])
        if file.exists():
            autotune.read(file)
        _file = file  # now that it is known to be one of launches, which may be written over
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    key = (launcher, device, *_signature(given))
    if key not in _seen:
        _seen[key] = None
        if autotune.tune(lambda: launcher(*given), gpu_name(device), _seconds):
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
