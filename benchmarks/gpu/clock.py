"""How calls are timed on a card: many of them between two events, over inputs that have left the cache."""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from benchmarks.floor import Rates

Call = Callable[[], Any]

#: A sample takes at least this long.
SAMPLE_SECONDS = 5e-3
#: Inputs of all sets together, as a multiple of the last cache; and what they may take of the card's memory.
COLD, MOST_MEMORY = 3.0, 0.2
MOST_SETS = 64
#: A file that is locked while something is timed, where processes that compile share a card.
LOCK_VARIABLE = "EFFATTN_CARD_LOCK"


class Clock(Protocol):
    device: torch.device

    def alone(self) -> AbstractContextManager[None]:
        """As long as this lasts, no other process of the run uses the card for what is timed or captured."""
        ...

    def sets(self, size: int) -> int:
        """How many sets of inputs of ``size`` bytes are needed for none of them to be in a cache when it is used."""
        ...

    def captured(self, calls: Sequence[Call]) -> Call:
        """The calls as one, without what it costs to issue them."""
        ...

    def seconds(self, call: Call, repeats: int) -> float:
        """Of so many calls, one after the other."""
        ...

    def rates(self, rates: Rates) -> None:
        """Measures the card, and keeps the best."""
        ...


class CudaClock:
    """CUDA events and graphs."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.properties = torch.cuda.get_device_properties(self.device)

    def alone(self) -> AbstractContextManager[None]:
        return _locked(os.environ[LOCK_VARIABLE]) if LOCK_VARIABLE in os.environ else nullcontext()

    def sets(self, size: int) -> int:
        wanted = math.ceil(COLD * self.properties.L2_cache_size / max(size, 1))
        possible = int(MOST_MEMORY * self.properties.total_memory / max(size, 1))
        return max(1, min(wanted + 1, possible, MOST_SETS))

    def captured(self, calls: Sequence[Call]) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def seconds(self, call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def rates(self, rates: Rates) -> None:
        size = 1 << 30
        source, target = (torch.ones(size // 2, dtype=torch.uint8, device=self.device) for _ in range(2))
        self._fastest(lambda: target.copy_(source), lambda rate: _keep(rates.copy, size, rate), size)
        for dtype, n in ((torch.bfloat16, 8192), (torch.float16, 8192), (torch.float32, 4096)):
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            self._fastest(lambda a=a, b=b: a @ b, lambda rate, t=dtype: _keep(rates.matmul, t, rate), 2 * n**3)

    def _fastest(self, call: Call, keep: Callable[[float], None], work: int) -> None:
        self.seconds(call, 3)
        for _ in range(5):
            keep(work / (self.seconds(call, 5) / 5))


class WallClock:
    """The rehearsal on a CPU, for tests: the same steps without a card."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    def sets(self, size: int) -> int:
        return 2

    def captured(self, calls: Sequence[Call]) -> Call:
        return lambda: [call() for call in calls]

    def seconds(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    def rates(self, rates: Rates) -> None:
        rates.copy[1 << 20], rates.matmul[torch.float32] = 1e10, 1e11
        rates.matmul |= {torch.bfloat16: 1e11, torch.float16: 1e11}


@contextmanager
def _locked(path: str) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # before the next one's turn


def _keep(best: dict[Any, float], key: Any, rate: float) -> None:
    best[key] = max(best.get(key, 0.0), rate)
