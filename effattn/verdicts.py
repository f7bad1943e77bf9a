"""Kernels that were found to fail on a GPU, so that the registry passes over them.

``make gpu`` tries every kernel on the GPU that is there and writes what failed into a file; the registry reads it. A
verdict holds for one operator, dtype and backend, on one GPU with one driver, for kernels made of the same sources: it
says nothing of kernels that have changed since. Without a file, nothing is asked.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effattn import _library
from effattn._tracing import constant_result
from effattn.backends import ORDER

#: The file; empty for none.
ENVIRONMENT_VARIABLE = "EFFATTN_VERDICTS"
SCHEMA = 1
#: A driver that cannot be asked: no two of them are known to be the same.
UNKNOWN = "unknown"
#: The GPU and the driver of kernels that run on the host, for tests.
HOST = ("host", "none")


class Verdict(NamedTuple):
    """A kernel that failed. ``identity`` is :attr:`effattn.backends.Backend.identity`'s answer at that time."""

    gpu: str
    driver: str
    backend: str
    operator: str
    dtype: str  #: as "bfloat16"
    direction: str  #: "forward" or "backward"; either is enough for the operator to be passed over
    identity: str
    commit: str
    status: str  #: "wrong", "crashed", "timeout" or "error"
    reason: str

    def text(self) -> str:
        return f"{self.direction} in {self.dtype}: {self.status}" + (f" ({self.reason})" if self.reason else "")


def default_path() -> Path:
    """Where verdicts lie unless EFFATTN_VERDICTS says otherwise."""
    return _library.cache_folder() / "verdicts.json"


def path() -> Path | None:
    """The file that is read here, which need not exist; None if EFFATTN_VERDICTS is empty."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return default_path() if named is None else Path(named) if named else None


def read(file: Path) -> list[Verdict]:
    """The verdicts of a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a file of verdicts; the text names the file.
    """
    expected = f"{file}: expected verdicts of schema {SCHEMA}"
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{expected}, got no JSON ({error})") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("verdicts"), list):
        got = f"schema {data.get('schema')!r}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{expected}, got {got}")
    found = []
    for entry in data["verdicts"]:
        if not isinstance(entry, dict) or set(entry) != set(Verdict._fields) or not _are_texts(entry.values()):
            raise ValueError(f"{expected}, each with texts for {', '.join(Verdict._fields)}, got {entry!r}")
        found.append(Verdict(**entry))
    return found


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def write(file: Path, verdicts: Sequence[Verdict]) -> None:
    """Writes a file of verdicts, at once: whoever reads it meanwhile finds the old one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps({"schema": SCHEMA, "verdicts": [v._asdict() for v in verdicts]}, indent=1) + "\n")
    beside.replace(file)


@cache
def _known() -> tuple[Verdict, ...]:
    """Those of this process's file: read once, when the registry first looks for a backend with kernels for GPUs."""
    if ENVIRONMENT_VARIABLE not in os.environ:
        # Nobody asked for the file in the user's cache: none where there is no home, or one that cannot be entered.
        try:
            if not default_path().exists():
                return ()
        except (OSError, RuntimeError):
            return ()
    file = path()
    if file is None:
        return ()
    try:
        return tuple(read(file))
    except (OSError, ValueError) as error:
        warnings.warn(f"effattn: verdicts about kernels are ignored: {error}", stacklevel=2)
        return ()


@constant_result
def reason(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend's kernels for ``op`` must not be used on the device, or None."""
    if not identity(backend):  # none for GPUs: whatever is wrong with the file concerns no call of the CPU
        return None
    name = str(dtype).removeprefix("torch.")
    asked = [v for v in _known() if (v.backend, v.operator, v.dtype) == (backend, op, name)]
    against = [v.text() for v in asked if _counts(v, [device])]
    return f"failed when {op} was tried on this GPU, {'; '.join(against)} (verdicts of {path()})" if against else None


def here() -> list[Verdict]:
    """Those that count on this machine, for the kernels that are installed."""
    if not _known():
        return []
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    return [v for v in _known() if _counts(v, devices)]


def _counts(verdict: Verdict, devices: Sequence[torch.device]) -> bool:
    """Whether it is about the kernels that are here, on one of the devices."""
    if verdict.driver == UNKNOWN or verdict.identity != identity(verdict.backend):
        return False
    return (verdict.gpu, verdict.driver) in map(gpu_and_driver, devices)


@cache
def identity(backend: str) -> str:
    """What the kernels of the backend with this name are made of; "" of one that has none for GPUs."""
    found = [b.identity for b in ORDER if b.name == backend and b.identity is not None]
    return found[0]() if found else ""


@cache
def gpu_and_driver(device: torch.device) -> tuple[str, str]:
    """The GPU's name and its driver's version."""
    return (torch.cuda.get_device_name(device), driver_version()) if device.type == "cuda" else HOST


def driver_version() -> str:
    """As nvidia-smi prints it, "580.65.06"; UNKNOWN without a driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return UNKNOWN
    text = ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() != 0:
        return UNKNOWN
    failed = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
    library.nvmlShutdown()
    return UNKNOWN if failed else text.value.decode()
