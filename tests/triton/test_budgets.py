"""What the loops of Triton's main kernels take for a GPU of 9.0, read from the machine code: a budget an instance.

What the compiler makes of a loop is a static count: branches that are not taken are in it.
"""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")

# Behind the line above (E402): without triton these would be errors, not a skip.
from machine_code import Kernel, parse  # noqa: E402
from no_gpu import compile_only, cuobjdump, options_for  # noqa: E402

from effattn.backends.triton import is_interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")

TARGET = "sm_90"
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture
def compiled(monkeypatch):
    return compile_only(monkeypatch, TARGET)


def kernel_of(compiled, name: str) -> tuple[Kernel, int]:
    """The kernel of this name that was compiled, and the registers of a thread."""
    (found,) = {id(kernel): kernel for kernel in compiled if kernel.metadata.name == name}.values()
    (code,) = parse(cuobjdump(found, "-sass")).values()
    (registers,) = re.findall(r"REG:(\d+)", cuobjdump(found, "-res-usage"))
    return code, int(registers)


def loop(kernel: Kernel) -> int:
    """Instructions of the outermost loop: from where it begins to the last branch that goes back there."""
    bodies = [
        kernel.blocks[to : n + 1]
        for n, following in enumerate(kernel.successors)
        for to in following
        if to < n or to == n
    ]
    return max(sum(map(len, body)) for body in bodies)


@pytest.mark.parametrize(
    ("layout", "sums", "attend"), [("token_major", 140, 430), ("channel_major", 120, 535)], ids=["tokens", "channels"]
)
def test_linear_attention(compiled, layout, sums, attend):
    """Heads of 32 channels in bfloat16."""
    from effattn._triton import relu_linear_attention

    def tensor():
        sizes = (16, 36, 4096, 32) if layout == "token_major" else (16, 36, 32, 4096)
        t = torch.empty(sizes, dtype=torch.bfloat16)
        return t if layout == "token_major" else t.mT

    q, k, v, out = (tensor() for _ in range(4))
    relu_linear_attention.forward(q, k, v, torch.empty(16, 36, 33, 32), out, 1e-15, options_for(TARGET))
    for name, instructions, registers in (("_accumulate_kv_state", sums, 96), ("_attend", attend, 112)):
        code, used = kernel_of(compiled, name)
        assert loop(code) <= instructions, name
        assert used <= registers, name


@pytest.mark.parametrize(("memory_format", "sums"), [("nchw", 1390), ("channels_last", 2260)])
def test_multi_scale(compiled, memory_format, sums):
    """b1 stage 3 at 1024 x 2048: 8 heads of 16 channels, 5 x 5, bfloat16."""
    from effattn._triton import multi_scale

    heads, head_dim = 8, 16
    channels = 3 * heads * head_dim

    def image(channels):
        return torch.empty(1, channels, 64, 128, dtype=torch.bfloat16).to(memory_format=FORMATS[memory_format])

    sizes = (channels, 1, 5, 5), (channels, head_dim, 1, 1), (channels,), (channels,)
    weights = [[torch.empty(size)] for size in sizes]
    kept = torch.empty(1, 2 * heads, head_dim + 1, head_dim)
    out = image(2 * heads * head_dim)
    multi_scale.attend(image(channels), weights, kept, out, head_dim, 1e-15, options_for(TARGET))
    code, used = kernel_of(compiled, "_accumulate_kv_state")
    assert loop(code) <= sums
    assert used <= 255
    assert kernel_of(compiled, "_attend")[1] <= 128


def test_cascade(compiled):
    """m4 stage 1: a head."""
    from effattn._triton import cascaded_group_attention

    x = torch.empty(256, 128, 14, 14, dtype=torch.bfloat16)
    kernels = (7, 5, 3, 3)
    weights = cascaded_group_attention.Weights(
        [torch.empty(64, 32, 1, 1) for _ in kernels],
        [torch.empty(64) for _ in kernels],
        [torch.empty(16, 1, k, k) for k in kernels],
        [torch.empty(16) for _ in kernels],
        torch.empty(4, 49, 49),
    )
    cascaded_group_attention.forward(x, weights, torch.empty_like(x), 0.25, (7, 7), options_for(TARGET))
    code, used = kernel_of(compiled, "_cga_forward")
    assert loop(code) <= 2380
    assert used <= 255
