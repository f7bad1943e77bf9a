"""How calls are timed on a GPU: many of them between two events, over inputs that have left the cache.

Inputs rotate over several sets. Where as many as may be do not fill the cache, it is filled with something else before
each pass over them, outside of the time, as Triton's do_bench does before each call. A pass of many calls pays
once for its two events and for the first launch on an idle GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.floor import Rates

Call = Callable[[], Any]

#: A sample takes at least this long.
SAMPLE_SECONDS = 5e-3
#: Inputs of all sets together, as a multiple of the last cache; and what they may take of the GPU's memory.
COLD, MOST_MEMORY = 3.0, 0.2
MOST_SETS = 64


class WallClock:
    """The rehearsal on a CPU, for tests: the same steps without a GPU; and what every clock can do."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def sets(self, size: int) -> int:
        """How many sets of inputs of ``size`` bytes are needed for none of them to be in a cache when it is used."""
        return 2

    def captured(self, calls: Sequence[Call]) -> Call:
        """The calls as one, without what it costs to issue them."""
        return lambda: [call() for call in calls]

    def clearing(self, size: int, is_graph: bool) -> Call | None:
        """What clears the cache before a call with inputs of ``size`` bytes, all sets together, which would stay in it.

        None if they would not. ``is_graph`` says that the call is a single launch.
        """
        return None

    def replayed(self, call: Call) -> Sequence[torch.Tensor]:
        """What a call of tensors gives when it is captured and replayed."""
        results: Sequence[torch.Tensor] = call()
        return results

    def seconds(self, call: Call, repeats: int, before: Call | None = None) -> float:
        """Of so many calls, one after the other, and of nothing that is done before each."""
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    def rates(self, rates: Rates) -> None:
        """Measures the GPU, and keeps the best."""
        rates.copy[1 << 20], rates.matmul[torch.float32] = 1e10, 1e11
        rates.matmul |= {torch.bfloat16: 1e11, torch.float16: 1e11}


class CudaClock(WallClock):
    """CUDA events and graphs."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.properties = torch.cuda.get_device_properties(self.device)
        self._cleared: torch.Tensor | None = None

    def sets(self, size: int) -> int:
        wanted = math.ceil(COLD * self.properties.L2_cache_size / max(size, 1))
        possible = int(MOST_MEMORY * self.properties.total_memory / max(size, 1))
        return max(1, min(wanted + 1, possible, MOST_SETS))

    def captured(self, calls: Sequence[Call]) -> Call:
        replay: Call = self._capture(super().captured(calls))[0].replay
        return replay

    def replayed(self, call: Call) -> Sequence[torch.Tensor]:
        graph, results = self._capture(call)
        graph.replay()
        return [t.clone() for t in results]

    def _capture(self, call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph, and what the call returned."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return graph, results

    def clearing(self, size: int, is_graph: bool) -> Call | None:
        enough = int(COLD * self.properties.L2_cache_size)
        if size >= enough:
            return None
        if self._cleared is None:
            self._cleared = torch.zeros(enough // 4, device=self.device)
        cleared = self._cleared

        def clear() -> None:
            cleared.amax()  # read: what is written, the cache would write back while the time is taken
            if not is_graph:  # calls must not be issued ahead, while this takes its time
                torch.cuda.synchronize()

        return clear

    def seconds(self, call: Call, repeats: int, before: Call | None = None) -> float:
        # Each call between two events of its own where something comes in between, else all between the same two.
        passes, inner = (1, repeats) if before is None else (repeats, 1)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(passes)]
        for start, end in events:
            if before is not None:
                before()
            start.record()
            for _ in range(inner):
                call()
            end.record()
        events[-1][1].synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in events) / 1e3

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


def _keep(best: dict[Any, float], key: Any, rate: float) -> None:
    best[key] = max(best.get(key, 0.0), rate)
