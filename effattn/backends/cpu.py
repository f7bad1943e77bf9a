"""The SIMD kernels of kernels/cpu, as torch operators of libeffattn."""

from __future__ import annotations

from collections.abc import Callable

import torch

from effattn import _library
from effattn.backends._base import Backend, Fused
from effattn.backends._sizes import beyond

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIMITS: dict[str, int] = {} if _library._C is None else _library._C.limits


def _functions() -> dict[str, Fused | Callable[..., torch.Tensor]]:
    if _library.error is not None:
        return {}
    differentiable = (
        "relu_linear_attention",
        "multi_scale_aggregation",
        "multi_scale_linear_attention",
        "biased_attention",
        "cascaded_group_attention",
    )
    training = "cascaded_group_attention_batch_norm"
    inference = ("lite_mla", "cascaded_group_attention_projected", "projected_attention")
    return {
        **{
            name: Fused(
                inference=getattr(torch.ops.effattn, name).default,
                forward=getattr(torch.ops.effattn, f"{name}_forward").default,
            )
            for name in differentiable
        },
        training: Fused(*2 * (getattr(torch.ops.effattn, f"{training}_forward").default,)),
        **{name: getattr(torch.ops.effattn, name).default for name in inference},
    }


_FUNCTIONS = _functions()


def _unavailable() -> str | None:
    return _library.error


def _reasons(op: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[str]:
    reasons = []
    if op not in _FUNCTIONS:
        reasons.append(f"has no {op}")
    if device.type != "cpu":
        reasons.append(f"takes CPU tensors, not {device.type}")
    if dtype not in DTYPES:
        reasons.append(f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}")
    return reasons + [f"takes {limit}" for limit in beyond(op, sizes, _LIMITS)]


BACKEND = Backend("cpu", _unavailable, _reasons, _FUNCTIONS)
