"""Looks for faster launches on the GPU at hand, if asked (``EFFATTN_TRITON_AUTOTUNE``, docs/environment.md).

Off unless asked for: tiles decide in which order is summed, so that a choice made by the clock would change the last
bits of results from one process to the next. What is found is kept in a file, with which results are the same again.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import effattn._triton as kernels
from effattn._triton import configs
from effattn._triton.configs import BY_GPU, Launch

for _module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
    importlib.import_module(_module.name)  # each adds its launches to the table

Key = tuple[str, str, int]

#: A candidate must be faster than the best by more than what is noise.
NOISE = 0.97
#: Elements of a tile that a thread may hold; more of them spill.
MAX_ELEMENTS = 32
WARPS, TOKENS, CHANNELS, STAGES = (2, 16), (16, 256), (16, 64), (1, 4)


def neighbours(launch: Launch) -> Iterator[Launch]:
    """Launches that differ in one thing, without those whose tiles are too large for their threads."""
    changes: list[dict[str, int]] = []
    for name, (least, most) in {"num_warps": WARPS, "tokens": TOKENS, "keys": TOKENS, "channels": CHANNELS}.items():
        value = getattr(launch, name)
        if value is not None:
            # What is outside already has a reason of its own.
            changes += [{name: size} for size in (value // 2, 2 * value) if least <= size <= most]
    changes += [{"num_stages": launch.num_stages + by} for by in (-1, 1)]
    for change in changes:
        candidate = replace(launch, **change)
        widest = max(candidate.channels, candidate.keys or 1)
        if not STAGES[0] <= candidate.num_stages <= STAGES[1]:
            continue
        if (candidate.tokens or 1) * widest <= MAX_ELEMENTS * 32 * candidate.num_warps:
            yield candidate


def tune(call: Callable[[], Any], gpu: str, seconds: Callable[[Callable[[], Any]], float]) -> dict[Key, Launch]:
    """Descends from the launches that ``call`` uses on ``gpu``, one entry after the other; keeps and returns them.

    ``seconds`` times a call. Entries that were found before stay as they are. A launch that fails is none.
    """
    chosen = BY_GPU.setdefault(gpu, {})
    with configs.asked() as used:
        call()
    found: dict[Key, Launch] = {}
    for key in sorted(used - chosen.keys()):
        best, launch = seconds(call), configs.launches(key[0])[key[1]][key[2]]
        for candidate in neighbours(launch):
            chosen[key] = candidate
            try:
                took = seconds(call)
            except Exception:
                continue
            if took < NOISE * best:
                best, launch = took, candidate
        chosen[key] = found[key] = launch
    return found


def read(file: Path) -> None:
    """Takes the launches of a file.

    Raises:
        ValueError: for a file of something else.
    """
    try:
        for gpu, entries in json.loads(file.read_text()).items():
            for entry in entries:
                key = (entry.pop("op"), entry.pop("kernel"), entry.pop("size"))
                _ = configs.launches(key[0])[key[1]][key[2]]
                BY_GPU.setdefault(gpu, {})[key] = Launch(**entry)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected launches that were written here, got {error!r}") from error


def write(file: Path) -> None:
    """Keeps all launches of all GPUs."""
    data = {
        gpu: [
            {"op": op, "kernel": kernel, "size": size, **asdict(launch)}
            for (op, kernel, size), launch in sorted(entries.items())
        ]
        for gpu, entries in BY_GPU.items()
    }
    # Never half a file, should two processes write at once.
    beside = file.with_name(f"{file.name}.{os.getpid()}.new")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    beside.replace(file)
