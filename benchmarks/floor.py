"""The floor of a case: no candidate can be faster than the machine copies its bytes and multiplies.

The copy bandwidth and the matmul rate are measured between the cases of the same run, and the best of
each counts: a floor must not rise because a neighbour was busy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

#: Bytes moved (read and written together) by the copies. Small ones live in a cache, as do small cases:
#: the floor of a case comes from the copy of the nearest size.
COPY_BYTES = tuple(1 << power for power in (18, 20, 22, 24, 26, 28))
MATMUL_SIZE = 1024


@dataclass(frozen=True)
class Work:
    """What a case must do at least: each input read once, each output written once, and the arithmetic."""

    bytes: int
    flops: int
    dtype: torch.dtype = torch.float32


@dataclass
class Rates:
    """The best seen so far: bytes per second for each size, operations per second for each dtype."""

    copy: dict[int, float] = field(default_factory=dict)
    matmul: dict[torch.dtype, float] = field(default_factory=dict)

    def measure(self, dtypes: set[torch.dtype]) -> None:
        for size in COPY_BYTES:
            # Written before they are read: untouched memory is one page of zeros, which is always cached.
            source, target = torch.ones(size // 2, dtype=torch.uint8), torch.ones(size // 2, dtype=torch.uint8)
            # Small copies are fastest on one thread, which is how numpy makes them, large ones on all.
            for copy in (partial(target.copy_, source), partial(np.copyto, target.numpy(), source.numpy())):
                self.copy[size] = max(self.copy.get(size, 0.0), size / _fastest(copy))
        # A narrow dtype may be computed in float32, which is faster where the machine lacks its arithmetic.
        for dtype in dtypes | {torch.float32}:
            left, right, out = (torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype) for _ in range(3))
            seconds = _fastest(partial(torch.mm, left, right, out=out))
            self.matmul[dtype] = max(self.matmul.get(dtype, 0.0), 2 * MATMUL_SIZE**3 / seconds)

    def floor(self, work: Work) -> tuple[float, str]:
        """Seconds, and which of the two floors it is."""
        nearest = min(self.copy, key=lambda size: abs(math.log(size / max(work.bytes, 1))))
        moving = work.bytes / self.copy[nearest]
        computing = work.flops / max(self.matmul[work.dtype], self.matmul[torch.float32])
        return (moving, "bytes") if moving >= computing else (computing, "operations")

    def as_json(self) -> dict[str, dict[str, float]]:
        return {
            "copy_GB_per_s": {str(size): rate / 1e9 for size, rate in self.copy.items()},
            "matmul_GFLOP_per_s": {
                str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in self.matmul.items()
            },
        }


def _fastest(call: Callable[[], object], budget: float = 0.02, at_least: int = 3) -> float:
    call()
    best, spent, calls = math.inf, 0.0, 0
    while spent < budget or calls < at_least:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return best
