"""The Triton kernels of kernels/triton; effattn/ops makes torch operators of them, in ``NAMESPACE``.

Every other file here launches the kernels of some operators, which its ``LAUNCHERS`` names; ``LIMITS`` are theirs.
Nothing of triton is imported before the first call.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from effattn._tracing import constant_result
from effattn._triton import configs
from effattn._triton.configs import MAX_CHANNELS
from effattn.backends._base import Backend, NamedSizes, beyond, refused_dtype
from effattn.backends.triton._launch import Launchers, is_interpreted, launch

NAMESPACE = "effattn_triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The first generation with the matrix units and the asynchronous copies that the kernels are laid out for.
MIN_CAPABILITY = (8, 0)
#: The most that the kernels take of a call's sizes, by name; of an operator's own sizes in its file.
LIMITS = {"channels": MAX_CHANNELS}
#: By operator.
LAUNCHERS: dict[str, Launchers] = {}
for _module in map(importlib.import_module, (m.name for m in pkgutil.iter_modules(__path__, f"{__name__}."))):
    LAUNCHERS |= getattr(_module, "LAUNCHERS", {})
    LIMITS |= getattr(_module, "LIMITS", {})


def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not is_interpreted():
        return "torch sees no GPU; with TRITON_INTERPRET=1 it takes CPU tensors, for tests"
    return None


def _reasons(op: str | None, device: torch.device, dtype: torch.dtype, sizes: NamedSizes) -> list[str]:
    reasons = [] if op is None or op in LAUNCHERS else [f"has no {op}"]
    mine = "cpu" if is_interpreted() else "cuda"
    if device.type != mine:
        reasons.append(f"takes {mine.upper()} tensors, not {device.type}")
    elif device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = _capability(device)
        if capability < MIN_CAPABILITY:
            needed, found = (".".join(map(str, c)) for c in (MIN_CAPABILITY, capability))
            reasons.append(f"needs a GPU of compute capability {needed}, this one has {found}")
    return reasons + refused_dtype(dtype, DTYPES) + beyond(sizes, LIMITS)


@constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _identity() -> str:
    """A digest of the sources of the kernels and of what launches them, and of their compiler's version."""
    found = hashlib.sha256()
    with suppress(PackageNotFoundError):
        found.update(version("triton").encode())
    for folder in (Path(configs.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


BACKEND = Backend("triton", _unavailable, _reasons, NAMESPACE, _identity)

__all__ = ["BACKEND", "DTYPES", "LAUNCHERS", "LIMITS", "NAMESPACE", "Launchers", "is_interpreted", "launch"]
