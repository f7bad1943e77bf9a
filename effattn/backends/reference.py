"""The plain formulations of :mod:`effattn.ops`: the specification, and the way on every other device."""

from __future__ import annotations

import torch

from effattn.backends._base import Backend, NamedSizes, refused_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _reasons(op: str | None, device: torch.device, dtype: torch.dtype, sizes: NamedSizes) -> list[str]:
    return refused_dtype(dtype, DTYPES)


BACKEND = Backend("reference", lambda: None, _reasons)
