"""Launches of Triton's kernels that compile for a GPU which need not be here, and run nothing."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from machine_code import Kernel, parse
from tiers import full
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: One of each vendor in the short tier: what spills does so on all of a vendor's, or nearly.
SHORT = ("sm_90", "gfx942")
on_every_target = pytest.mark.parametrize("target", [name if name in SHORT else full(name) for name in TARGETS])
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NoGpu:
    """What the launch asks of a driver before it compiles. Kernels are kept by device: each target is one."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: list(TARGETS.values()).index(target)
        self.get_current_stream = lambda device: 0


def compile_only(monkeypatch, target):
    """The list of what launches compile for the target from here on, in order; nothing runs."""
    kernels = []
    run = JITFunction.run

    def warm_up(self, *args, **kwargs):
        kernels.append(run(self, *args, **{**kwargs, "warmup": True}))

    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(driver, "_active", NoGpu(TARGETS[target]))
    return kernels


def cuobjdump(kernel, option: str) -> str:
    """What it says of a kernel that is compiled for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def options_for(target):
    from effattn._triton.numerics import TargetOptions

    return TargetOptions.of(TARGETS[target].backend)


def spilled(kernel) -> int:
    """Bytes of local memory that a kernel needs, or registers that it spills to memory.

    Scalar registers that AMD's compiler runs out of are kept in lanes of vector registers, which is no memory.
    """
    if "amdgcn" in kernel.asm:
        found = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", kernel.asm["amdgcn"])
        assert len(found) == 2
        return sum(map(int, found))
    (stack,) = re.findall(r"STACK:(\d+)", cuobjdump(kernel, "-res-usage"))
    return int(stack)


def registers(kernel) -> int:
    """Of a program, of 65536 that a multiprocessor of NVIDIA's has; AMD's compiler keeps to what there is."""
    if "amdgcn" in kernel.asm:
        return 0
    per_thread = re.search(r"REG:(\d+)", cuobjdump(kernel, "-res-usage"))
    return -(-int(per_thread[1]) // 8) * 8 * 32 * kernel.metadata.num_warps


def names_of(compiled) -> list[str]:
    """Of what was compiled, checked: nothing is spilled, and a program fits into a multiprocessor."""
    found = [(kernel.metadata.name, spilled(kernel)) for kernel in compiled]
    assert not any(bytes_or_registers for _, bytes_or_registers in found), found
    for kernel in compiled:
        assert registers(kernel) <= 65536, kernel.metadata.name
        # The least of the targets: gfx942.
        assert kernel.metadata.shared <= 65536, kernel.metadata.name
    return [name for name, _ in found]


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
