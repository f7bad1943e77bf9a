"""What the launches of all operators share: how results are filled, and for which card kernels are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

from effattn._triton.layout import with_mergeable_rows


class Launchers(NamedTuple):
    """Of an operator, what fills its results: (results, *arguments, target), of a torch operator's arguments.

    Tensors are on the current device, rows of images follow each other, weights and what is kept are contiguous, and
    neither the output nor its gradient is empty.
    """

    #: Results: the output, and what is kept.
    forward: Callable[..., None]
    #: Results: gradients of the tensors.
    backward: Callable[..., None]


def is_interpreted() -> bool:
    """Whether Triton runs on tensors of the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def launch(
    launcher: Callable[..., None],
    like_out: torch.Tensor,
    results: Sequence[Any],
    arguments: Sequence[Any],
    images: int,
    has_rows: bool,
) -> None:
    """Fills the results, tensors or lists of them; with zeros where there is nothing to compute.

    Args:
        like_out: the output or its gradient.
        arguments: of a torch operator, the first ``images`` of which, (B, C, H, W) if it ``has_rows``, are no weights.
    """
    if like_out.numel() == 0:
        clear(results)
        return
    first = [with_mergeable_rows(t) for t in arguments[:images]] if has_rows else arguments[:images]
    # Triton launches on the current device.
    with torch.cuda.device(like_out.device) if like_out.is_cuda else nullcontext():
        launcher(results, *first, *map(_contiguous, arguments[images:]), target(like_out))


def clear(results: Sequence[Any]) -> None:
    for result in results:
        for t in (result,) if isinstance(result, torch.Tensor) else result:
            t.zero_()


def _contiguous(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [t.contiguous() for t in argument]
    return argument.contiguous() if isinstance(argument, torch.Tensor) else argument


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
