"""The SIMD kernels of kernels/cpu, as torch operators of libeffattn."""

from __future__ import annotations

import torch

from effattn import _library
from effattn.backends._base import Backend, NamedSizes, beyond, refused_dtype

NAMESPACE = "effattn"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = _library.operators("CPU")
#: The most that the kernels take of a call's sizes, by name.
LIMITS: dict[str, int] = {} if _library._C is None else _library._C.limits


def _reasons(op: str | None, device: torch.device, dtype: torch.dtype, sizes: NamedSizes) -> list[str]:
    reasons = [] if op is None or op in OPERATORS else [f"has no {op}"]
    if device.type != "cpu":
        reasons.append(f"takes CPU tensors, not {device.type}")
    return reasons + refused_dtype(dtype, DTYPES) + beyond(sizes, LIMITS)


BACKEND = Backend("cpu", lambda: _library.error, _reasons, NAMESPACE)
