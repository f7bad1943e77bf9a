"""What the launches of all operators share: how results are filled, and for which GPU kernels are."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from effattn._triton.layout import clear, with_mergeable_rows
from effattn.backends.triton import _tuning


class Launchers(NamedTuple):
    """Which functions of a file of kernels/triton fill an operator's results.

    They take (results, *arguments, target), of a torch operator's arguments. Results are the output and what is kept,
    or gradients of the tensors. Rows of images follow each other, weights and what is kept are contiguous, and neither
    the output nor its gradient is empty.
    """

    file: str
    forward: str = "forward"
    backward: str = "backward"


def is_interpreted() -> bool:
    """Whether Triton runs on tensors of the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def launch(
    launchers: Launchers,
    name: str,
    like_out: torch.Tensor,
    results: Sequence[Any],
    arguments: Sequence[Any],
    num_activations: int,
    are_images: bool,
) -> None:
    """Fills the results, tensors or lists of them; with zeros where there is nothing to compute.

    Args:
        name: of the function.
        like_out: the output or its gradient.
        arguments: of a torch operator.
        num_activations: how many of them, the first, are activations; the rest are weights and options.
        are_images: whether activations are (B, C, H, W).
    """
    if like_out.numel() == 0:
        clear(results)
        return
    launcher = getattr(importlib.import_module(f"effattn._triton.{launchers.file}"), name)  # imports triton
    first = [with_mergeable_rows(t) for t in arguments[:num_activations]] if are_images else arguments[:num_activations]
    # Triton launches on the current device.
    with torch.cuda.device(like_out.device) if like_out.is_cuda else nullcontext():
        given = (results, *first, *map(_contiguous, arguments[num_activations:]), target(like_out))
        if _tuning.is_on():
            _tuning.before(launcher, like_out.device, given)
        launcher(*given)


def _contiguous(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [t.contiguous() for t in argument]
    return argument.contiguous() if isinstance(argument, torch.Tensor) else argument


def target(t: torch.Tensor) -> Any:
    """The GPU of a tensor, and whether torch allows TF32 for products in float32."""
    from effattn._triton.numerics import TargetOptions

    is_relaxed = t.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    backend = "cuda" if torch.version.hip is None else "hip"
    return TargetOptions.of(backend, relaxed=is_relaxed, gpu=_tuning.gpu_name(t.device))
