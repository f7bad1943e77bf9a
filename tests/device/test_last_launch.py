"""The CUDA library knows for which call it launched a kernel last."""

from __future__ import annotations

import ctypes

import pytest
import torch

import effattn
from effattn import _library
from effattn.testing import make_tensor


def last_launch() -> str:
    library = ctypes.CDLL(str(_library.library_path.with_name("libeffattn_cuda.so")))
    library.effattn_cuda_last_launch.restype = ctypes.c_char_p
    return library.effattn_cuda_last_launch().decode()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_the_last_launch_is_told(device, backend):
    q = make_tensor(2, 50, 8, dtype=torch.bfloat16).to(device).requires_grad_()
    effattn.relu_linear_attention(q.detach(), q.detach(), q.detach())
    assert last_launch().startswith("relu_linear_attention, inference, bfloat16 (2, 50, 8): the kernel of ")
    effattn.relu_linear_attention(q, q, q).sum().backward()
    assert last_launch().startswith("relu_linear_attention, backward, bfloat16 (2, 50, 8): ")
    qkv = make_tensor(1, 24, 5, 6).to(device)
    weights = [make_tensor(24, 1, 3, 3).to(device)], [make_tensor(24, 8, 1, 1).to(device)]
    effattn.multi_scale_linear_attention(qkv, *weights, head_dim=8)
    assert (
        last_launch().startswith("multi_scale, attention, float32 (1, 24, 5, 6): ") and " blocks of " in last_launch()
    )
