"""What the launches of all operators share: which tensors kernels can address, and for which card they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

from effattn._triton.layout import MAX_DIMENSIONS, Groups


class Launchers(NamedTuple):
    """Of an operator, each with the arguments and results of a torch operator: inference, _forward, _backward."""

    inference: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def is_interpreted() -> bool:
    """Whether Triton runs on tensors of the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def addressable(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors (..., tokens, channels) whose leading dimensions the kernels can address: mostly as they are."""
    groups = Groups.of(*tensors)
    return tensors if len(groups.merged) <= MAX_DIMENSIONS else tuple(t.contiguous() for t in tensors)


def copied(result: torch.Tensor, from_: torch.Tensor) -> None:
    """Takes what was written beside a result that could not be addressed."""
    if from_ is not result:
        result.copy_(from_)


def on_device_of(t: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def target(t: torch.Tensor) -> Any:
    """What a card wants, and what torch is told of products in float32."""
    from effattn._triton.numerics import TargetOptions

    is_relaxed = t.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    backend = "cuda" if torch.version.hip is None else "hip"
    return TargetOptions.of(backend, relaxed=is_relaxed, gpu=card(t.device))


@cache
def card(device: torch.device) -> str:
    """The name under which launches are kept; none of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
