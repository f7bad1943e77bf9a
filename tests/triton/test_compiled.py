"""Every kernel as it is launched, compiled ahead of time for cards that need not be there: no register is spilled."""

from __future__ import annotations

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

# Behind the line above (E402): without triton these would be errors, not a skip.
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from effattn.backends.triton import is_interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NoCard:
    """What the launch asks of a driver before it compiles. Kernels are kept by device: each target is one."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: list(TARGETS.values()).index(target)
        self.get_current_stream = lambda device: 0


@pytest.fixture
def compiled(monkeypatch, target):
    """What launches compile for the target, in order; nothing runs."""
    kernels = []
    run = JITFunction.run

    def warm_up(self, *args, **kwargs):
        kernels.append(run(self, *args, **{**kwargs, "warmup": True}))

    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(driver, "_active", NoCard(TARGETS[target]))
    return kernels


def spilled(kernel) -> int:
    """Bytes of local memory that a kernel needs, or registers that it spills to memory.

    Scalar registers that AMD's compiler runs out of are kept in lanes of vector registers, which is no memory.
    """
    if "amdgcn" in kernel.asm:
        found = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", kernel.asm["amdgcn"])
        assert len(found) == 2
        return sum(map(int, found))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", report)
    return int(stack)


@pytest.mark.parametrize(
    ("layout", "dtype", "channels"),
    [
        *product(
            ("token_major", "channel_major"),
            (torch.float32, torch.bfloat16),
            ((16, 16), (32, 32), (64, 64), (128, 128)),
        ),
        ("token_major", torch.float16, (128, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_relu_linear_attention_spills_nothing(compiled, target, channels, dtype, layout):
    from effattn.kernels import relu_linear_attention
    from effattn.kernels.numerics import TargetOptions

    def tensor(channels):
        sizes = (2, 4, 4096, channels) if layout == "token_major" else (2, 4, channels, 4096)
        t = torch.empty(sizes, dtype=dtype)
        return t if layout == "token_major" else t.mT

    head_dim, value_dim = channels
    options = TargetOptions.of(TARGETS[target].backend)
    sums = torch.empty(2, 4, value_dim + 1, head_dim)
    q, k, grad_q, grad_k = (tensor(head_dim) for _ in range(4))
    v, out, grad_out, grad_v = (tensor(value_dim) for _ in range(4))
    relu_linear_attention.forward(q, k, v, sums, out, 1e-15, options)
    relu_linear_attention.backward(grad_out, q, k, v, sums, (grad_q, grad_k, grad_v), 1e-15, options)
    names = [kernel.metadata.name for kernel in compiled]
    assert names == [
        *("_sum_tokens", "_add_up", "_attend"),
        *("_query_gradients", "_sum_tokens", "_add_up", "_key_gradients"),
    ]
    found = [spilled(kernel) for kernel in compiled]
    assert not any(found), list(zip(names, found, strict=True))
