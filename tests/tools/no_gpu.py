"""Launches of Triton's kernels that compile for a GPU which need not be here, and run nothing."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
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
