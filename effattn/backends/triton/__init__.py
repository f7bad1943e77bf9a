"""The Triton kernels of kernels/triton, as torch operators beside those of libeffattn.

Their schemas are read from libeffattn, where they stand once; what they check is said by :mod:`effattn.ops`. Nothing of
triton is imported before the first call.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from effattn import _library
from effattn._triton import configs
from effattn._triton.configs import MAX_CHANNELS, MAX_TALKING_HEADS
from effattn.backends._base import Backend, Fused
from effattn.backends._sizes import beyond
from effattn.backends.triton import (
    _tuning,
    biased_attention,
    cascaded_group_attention,
    multi_scale,
    relu_linear_attention,
)
from effattn.backends.triton._launch import is_interpreted

NAMESPACE = "effattn_triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The first generation with the matrix units and the asynchronous copies that the kernels are laid out for.
LEAST_CAPABILITY = (8, 0)
#: The most that the kernels take of a call's sizes, by name.
LIMITS = {"channels": MAX_CHANNELS, "talking_heads": MAX_TALKING_HEADS}


def _unavailable() -> str | None:
    if _library.error is not None:
        return _library.error
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not is_interpreted():
        return "torch sees no GPU; with TRITON_INTERPRET=1 it takes CPU tensors, for tests"
    return None


def _reasons(op: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[str]:
    reasons = []
    if op not in _FUNCTIONS:
        reasons.append(f"has no {op}")
    mine = "cpu" if is_interpreted() else "cuda"
    if device.type != mine:
        reasons.append(f"takes {mine.upper()} tensors, not {device.type}")
    elif device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = _capability(device)
        if capability < LEAST_CAPABILITY:
            needed, found = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
            reasons.append(f"needs a card of compute capability {needed}, this one has {found}")
    if dtype not in DTYPES:
        reasons.append(f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}")
    return reasons + [f"takes {limit}" for limit in beyond(op, sizes, LIMITS)]


@torch.compiler.assume_constant_result
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


# --- registration -------------------------------------------------------------------------------------------------

#: By function, the kernels of its operators: inference, _forward and _backward.
_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "relu_linear_attention": (
        relu_linear_attention.inference,
        relu_linear_attention.forward,
        relu_linear_attention.backward,
    ),
    "multi_scale_aggregation": (multi_scale.aggregation, multi_scale.aggregation, multi_scale.aggregation_backward),
    "multi_scale_linear_attention": (
        multi_scale.attention,
        multi_scale.attention_forward,
        multi_scale.attention_backward,
    ),
    "cascaded_group_attention": (
        cascaded_group_attention.forward,
        cascaded_group_attention.forward,
        cascaded_group_attention.backward,
    ),
    "biased_attention": (biased_attention.forward, biased_attention.forward, biased_attention.backward),
}
_FUNCTIONS: dict[str, Fused | Callable[..., torch.Tensor]] = {}
BACKEND = Backend("triton", _unavailable, _reasons, _FUNCTIONS, _identity)
_OPERATORS = torch.library.Library(NAMESPACE, "FRAGMENT")


def check_sizes(op: str, sizes: tuple[int, ...]) -> None:
    """Raises RuntimeError where :func:`_reasons` would name them."""
    for limit in beyond(op, sizes, LIMITS):
        torch._check(False, lambda limit=limit: f"the kernels take {limit}")


def register(name: str, check: Callable[..., None], check_backward: Callable[..., None]) -> bool:
    """Makes operators of a function's kernels, and tells whether it has any.

    Args:
        name: of the function.
        check, check_backward: raise RuntimeError for wrong arguments of the operators.
    """
    if _library.error is not None or name not in _KERNELS:
        return False
    checks = (check, check, check_backward)
    for suffix, checks_arguments, kernel in zip(("", "_forward", "_backward"), checks, _KERNELS[name], strict=True):
        schema = str(getattr(torch.ops.effattn, name + suffix).default._schema)
        _OPERATORS.define(schema.removeprefix("effattn::"))
        implementation = _checked(name + suffix, checks_arguments, kernel)
        _OPERATORS.impl(name + suffix, implementation, "CPU" if is_interpreted() else "CUDA")
    operators = getattr(torch.ops, NAMESPACE)
    _FUNCTIONS[name] = Fused(getattr(operators, name).default, getattr(operators, f"{name}_forward").default)
    return True


def _checked(name: str, check: Callable[..., None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        check(*arguments)
        if _tuning.is_on():
            _tuning.before(name, kernel, arguments)
        return kernel(*arguments)

    return checked
