"""The CUDA kernels of kernels/cuda, as torch operators of libeffattn_cuda: those of libeffattn, for other tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effattn import _library
from effattn._tracing import constant_result
from effattn.backends._base import Backend, NamedSizes, beyond, refused_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Capabilities of systems on a chip, which are no later minors of the GPUs' (CUDA's guide, binary compatibility).
_INTEGRATED = ((8, 7), (10, 1))


_KEY = "CPU" if _library.cuda_is_emulated else "CUDA"
OPERATORS = _library.operators(_KEY) if _library.cuda_error is None else frozenset()


def _unavailable() -> str | None:
    if _library.cuda_error is not None or _library.cuda_is_emulated:
        return _library.cuda_error
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return _driver_error() if torch.cuda.is_available() else "torch sees no CUDA device"


def limits(op: str) -> dict[str, int]:
    """The largest sizes of a call that the kernels of an operator take, by name; empty without the library."""
    return _library.cuda_limits.get(op, {})


def _reasons(op: str | None, device: torch.device, dtype: torch.dtype, sizes: NamedSizes) -> list[str]:
    reasons = [] if op is None or op in OPERATORS else [f"has no {op}"]
    mine = "cpu" if _library.cuda_is_emulated else "cuda"
    if device.type != mine:
        reasons.append(f"takes {mine.upper()} tensors, not {device.type}")
    elif mine == "cuda" and _unavailable() is None:
        capability = _capability(device)
        if not runs_on(capability, _library.cuda_archs):
            found = ".".join(map(str, capability))
            archs = ", ".join(_library.cuda_archs)
            reasons.append(f"is compiled for {archs}, this GPU has {found} (EFFATTN_CUDA_ARCHS)")
    return reasons + refused_dtype(dtype, DTYPES) + ([] if op is None else beyond(sizes, limits(op)))


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether a GPU can run what was compiled for these: "80" runs on 8.0 and later minors of 8, "90a" on 9.0 alone,
    and what has "+PTX" on every later GPU. Those of ``_INTEGRATED`` run no other GPU's code."""
    for arch in archs:
        compiled = divmod(int(arch.removesuffix("+PTX").rstrip("af")), 10)
        if arch.endswith("a"):
            fits = compiled == capability
        else:
            same = compiled == capability if capability in _INTEGRATED else compiled[0] == capability[0]
            fits = compiled <= capability and (arch.endswith("+PTX") or same)
        if fits:
            return True
    return False


@constant_result
def _driver_error() -> str | None:
    return _library.cuda_driver_error()


@constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


BACKEND = Backend("cuda", _unavailable, _reasons, "effattn", lambda: _library.cuda_digest)
