"""Products and roundings that all kernels share, and what differs from one kind of GPU to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton import knobs

from effattn._triton.configs import find

#: Whether kernels run in Triton's interpreter, on tensors of the CPU. It multiplies bfloat16 in no useful precision and
#: cuts off what does not fit where hardware rounds to nearest.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


#: Of a thread, and of a multiprocessor of NVIDIA's.
MAX_REGISTERS, REGISTERS = 255, 65536


@dataclass(frozen=True)
class TargetOptions:
    """Of the GPU that a call runs on: ``precision`` of products in float32, whether registers are named, its name."""

    precision: str
    names_registers: bool = False
    gpu: str = ""

    def options(self, op: str, kernel: str, size: int, **chunked: int) -> dict[str, Any]:
        """Of a kernel's launch (:mod:`effattn._triton.configs`), and how many registers a thread may have.

        Without, the assembler spills a register or two to stay below a round number of its own choice.
        """
        options = find(op, kernel, size, self.gpu).options(**chunked)
        if not self.names_registers:
            return options
        return {**options, "maxnreg": min(MAX_REGISTERS, REGISTERS // (32 * options["num_warps"]) // 8 * 8)}

    @staticmethod
    def of(backend: str, *, relaxed: bool = False, gpu: str = "") -> TargetOptions:
        """Of ``"cuda"`` or ``"hip"``; ``relaxed``: one product of TF32 will do, where three are as exact as float32."""
        if backend == "hip":
            return TargetOptions("ieee", gpu=gpu)
        return TargetOptions("tf32" if relaxed else "tf32x3", not INTERPRETED.value, gpu)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. Operands of one narrow type are multiplied exactly; all others by ``PRECISION``."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # Of NaN the payload must not overflow into the exponent.
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def relu(x):
    """Of NaN, NaN. In float32, since the interpreter compares the bits of bfloat16."""
    wide = x.to(tl.float32)
    return tl.where(wide <= 0, 0.0, wide).to(x.dtype)


@triton.jit
def clamp_subnormal(denominator):
    """Subnormal ones, whose inverse float32 may not hold, count as 2^-126: zero times infinity would be NaN."""
    return tl.where(denominator > 0, tl.maximum(denominator, 1.1754943508222875e-38), denominator)
