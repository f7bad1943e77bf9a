"""The Triton kernels of kernels/triton, as torch operators beside those of libeffattn.

Their schemas are read from libeffattn, where they stand once; what they check is said by :mod:`effattn.ops`. Nothing of
triton is imported before the first call.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from effattn import _library
from effattn.backends._base import Backend, Fused
from effattn.backends._memory import empty_in_order_of
from effattn.kernels.configs import MOST_CHANNELS
from effattn.kernels.layout import MOST_DIMENSIONS, Groups

NAMESPACE = "effattn_triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The first generation with the matrix units and the asynchronous copies that the kernels are laid out for.
LEAST_CAPABILITY = (8, 0)


def is_interpreted() -> bool:
    """Whether Triton runs on tensors of the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _unavailable() -> str | None:
    if _library.error is not None:
        return _library.error
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not is_interpreted():
        return "torch sees no GPU; with TRITON_INTERPRET=1 it takes CPU tensors, for tests"
    return None


def _reasons(op: str, device: torch.device, dtype: torch.dtype, channels: tuple[int, ...]) -> list[str]:
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
    for count in channels:
        if count > MOST_CHANNELS:
            reasons.append(f"takes heads of up to {MOST_CHANNELS} channels, not {count}")
    return reasons


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# --- relu_linear_attention ----------------------------------------------------------------------------------------


def _relu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    return _relu_linear_attention_forward(q, k, v, eps)[0]


def _relu_linear_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from effattn.kernels import relu_linear_attention

    _check_channels(q, v)
    out = empty_in_order_of(q, (*q.shape[:-1], v.shape[-1]))
    sums = q.new_empty((*q.shape[:-2], v.shape[-1] + 1, q.shape[-1]), dtype=torch.float32)
    if 0 in (q.shape[-1], v.shape[-1]):  # 0 / (0 + eps)
        out.fill_(0.0 if eps > 0 else math.nan)
        sums.zero_()
    elif sums.numel() > 0:
        q, k, v, into = _addressable(q, k, v, out)
        with _on_device_of(q):
            relu_linear_attention.forward(q, k, v, sums, into, eps, _target(q))
        _copied(out, into)
    return out, sums


def _relu_linear_attention_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    from effattn.kernels import relu_linear_attention

    _check_channels(q, v)
    grads = tuple(empty_in_order_of(t, t.shape) for t in (q, k, v))
    if 0 in (q.shape[-1], v.shape[-1]):
        for grad in grads:
            grad.zero_()
    elif sums.numel() > 0:
        grad_out, q, k, v, *into = _addressable(grad_out, q, k, v, *grads)
        with _on_device_of(q):
            relu_linear_attention.backward(
                grad_out, q, k, v, sums.contiguous(), (into[0], into[1], into[2]), eps, _target(q)
            )
        for grad, t in zip(grads, into, strict=True):
            _copied(grad, t)
    return grads


# --- what all launches share --------------------------------------------------------------------------------------


def _check_channels(*tensors: torch.Tensor) -> None:
    for t in tensors:
        torch._check(t.shape[-1] <= MOST_CHANNELS, lambda: f"head_dim and value_dim must be at most {MOST_CHANNELS}")


def _addressable(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors (..., tokens, channels) whose leading dimensions the kernels can address: mostly as they are."""
    groups = Groups.of(*tensors)
    return tensors if len(groups.merged) <= MOST_DIMENSIONS else tuple(t.contiguous() for t in tensors)


def _copied(result: torch.Tensor, from_: torch.Tensor) -> None:
    if from_ is not result:
        result.copy_(from_)


def _on_device_of(t: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _target(t: torch.Tensor) -> Any:
    """What a card wants, and what torch is told of products in float32."""
    from effattn.kernels.numerics import TargetOptions

    is_relaxed = t.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TargetOptions.of("cuda" if torch.version.hip is None else "hip", relaxed=is_relaxed)


# --- registration -------------------------------------------------------------------------------------------------

_KERNELS: dict[str, Callable[..., Any]] = {
    "relu_linear_attention": _relu_linear_attention,
    "relu_linear_attention_forward": _relu_linear_attention_forward,
    "relu_linear_attention_backward": _relu_linear_attention_backward,
}
_FUNCTIONS: dict[str, Fused | Callable[..., torch.Tensor]] = {}
BACKEND = Backend("triton", _unavailable, _reasons, _FUNCTIONS)
_OPERATORS = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(name: str, checks: dict[str, Callable[..., None]]) -> bool:
    """Makes operators of a function's kernels, and tells whether it has any.

    Args:
        name: of the function.
        checks: by operator, ``name`` and what is put behind it, what raises RuntimeError for wrong arguments.
    """
    if _library.error is not None or name not in _KERNELS:
        return False
    for operator, check in checks.items():
        schema = str(getattr(torch.ops.effattn, operator).default._schema)
        _OPERATORS.define(schema.removeprefix("effattn::"))
        _OPERATORS.impl(operator, _checked(check, _KERNELS[operator]), "CPU" if is_interpreted() else "CUDA")
    operators = getattr(torch.ops, NAMESPACE)
    _FUNCTIONS[name] = Fused(getattr(operators, name).default, getattr(operators, f"{name}_forward").default)
    return True


def _checked(check: Callable[..., None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        check(*arguments)
        return kernel(*arguments)

    return checked
