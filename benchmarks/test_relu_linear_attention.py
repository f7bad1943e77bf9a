"""Microbenchmarks of relu_linear_attention: ``pytest benchmarks --benchmark-only``.

Each group holds effattn and the official formulation in eager mode on the same tensors. For numbers to
publish use ``python -m benchmarks``, which takes the peers in turn and settles the allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import effattn
from benchmarks import linear_attention as rla

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {"effattn": effattn.relu_linear_attention, "official": rla.official}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", rla.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", rla.ATTENTION_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward and backward"])
def test_relu_linear_attention(
    benchmark: Any, case: rla.AttentionCase, dtype: torch.dtype, layout: str, function: str, training: bool
) -> None:
    benchmark.group = ", ".join(
        (case.name, str(dtype).removeprefix("torch."), layout, "forward and backward" if training else "forward")
    )
    data = rla.Inputs(case, dtype, training)
    with torch.set_grad_enabled(training):
        call: Callable[[], Any] = rla.torch_call(FUNCTIONS[function], layout, data)
        benchmark(call)
