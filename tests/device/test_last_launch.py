"""The CUDA library knows for which call it launched a kernel last."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_only import cuda_only
from specified import mapped, with_gradients

from effattn import _library
from effattn.backends.triton import LAUNCHERS
from effattn.ops import OPERATORS
from effattn.testing import make_arguments


def last_launch() -> tuple[str, str, str]:
    """The file and the function that it was launched from, and the rest of what is told."""
    library = ctypes.CDLL(str(_library.library_path.with_name("libeffattn_cuda.so")))
    library.effattn_cuda_last_launch.restype = ctypes.c_char_p
    file, function, rest = library.effattn_cuda_last_launch().decode().split(", ", 2)
    return file, function, rest


@cuda_only
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_last_launch_is_told(device, backend, name):
    operator = OPERATORS[name]
    arguments = mapped(lambda t: t.to(device), make_arguments(operator, operator.cases[0], torch.bfloat16))
    shape = ", ".join(map(str, arguments[0].shape))
    operator(*arguments)
    file, inference, rest = last_launch()
    assert name.startswith(file) and rest.startswith(f"bfloat16 ({shape}): ") and " blocks of " in rest
    with_gradients(operator, operator, arguments, torch.bfloat16)
    file, backward, rest = last_launch()
    assert name.startswith(file) and backward != inference and f"bfloat16 ({shape}): " in rest
