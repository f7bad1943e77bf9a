"""Takes a case and the ways to compute it, lets through who is right, and times them in turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import effattn
from benchmarks import peers
from benchmarks.floor import Work
from benchmarks.gpu import turns
from benchmarks.gpu.clock import SAMPLE_SECONDS, WallClock
from benchmarks.runner import GATE, Accuracy, Role, Row, explain, new_row
from effattn import testing, tolerance

if TYPE_CHECKING:
    from benchmarks.gpu.case import Telling

Arguments = Sequence[Any]  # tensors, and lists of them
Function = Callable[..., torch.Tensor]

#: What GATE is for gradients in a narrow type: what it rounds between its parts opens and shuts relus.
PEER_GRADIENTS = 0.5
LEAST_NORM = 1e-3
WARM_SECONDS = 20e-3
OURS, STOCK = "effattn", "stock"
#: What is wrong with a kernel whose results depend on how it is launched.
OTHER_BITS = "a graph's replay gives other bits than a call"


@dataclass(frozen=True)
class GpuCase:
    """What is computed, by whom.

    ``make`` gives the arguments, on the CPU. ``truth`` and ``peers`` compute what ``ours`` does, from the
    same arguments, the former in float64. ``context`` compute something else that is used for it. ``compile_ours`` says
    that torch.compile has something to do in what is ours.
    """

    suite: str
    name: str
    dtype: torch.dtype
    sizes: dict[str, int]
    work: Work
    make: Callable[[], Arguments]
    truth: Function
    ours: Function
    peers: Mapping[str, Function]
    context: Mapping[str, Function] = field(default_factory=dict)
    training: bool = False
    compile_ours: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Way:
    """How a function is called: compiled in a mode of torch.compile or not, captured in a graph or not."""

    candidate: str
    variant: str
    role: Role
    function: Function
    mode: str | None = None
    graph: bool = False


#: What torch.compile is asked for: a mode, and whether its calls are captured, unless it brings graphs of its own.
QUICK_MODES = (("default", True), ("reduce-overhead", False))
ALL_MODES = (*QUICK_MODES, ("default", False), ("max-autotune", False), ("max-autotune-no-cudagraphs", True))
_CANDIDATES = {
    "default": "compiled",
    "reduce-overhead": "reduce-overhead",
    "max-autotune": "max-autotune",
    "max-autotune-no-cudagraphs": "max-autotune",
}


def plain_ways(case: GpuCase, backends: Sequence[str]) -> list[Way]:
    """Ours on each of the backends, and everybody else without torch.compile: in graphs, then as calls.

    Others come first: what is ours is what may end the process.
    """
    found = []
    for graph in (True, False):
        variant = "graph" if graph else "calls"
        for name, function in case.peers.items():
            found.append(Way(f"{name} eager", variant, Role.PEER, function, graph=graph))
        for name, function in case.context.items():
            found.append(Way(name, variant, Role.CONTEXT, function, graph=graph))
        if graph:
            stock = next(iter(case.peers))
            found.append(Way(f"{stock} eager (again)", variant, Role.CHECK, case.peers[stock], graph=True))
    for graph in (True, False):
        for name, function in ours(case, backends).items():
            found.append(Way(name, "graph" if graph else "calls", Role.OURS, function, graph=graph))
    return found


def compiled_ways(case: GpuCase, modes: Sequence[tuple[str, bool]]) -> list[Way]:
    """Under torch.compile, in these modes."""
    functions = [(name, Role.PEER, function) for name, function in case.peers.items()]
    if case.compile_ours:
        functions.append((OURS, Role.OURS, case.ours))
    return [
        Way(f"{name} {_CANDIDATES[mode]}", "graph" if graph else "calls", role, function, mode, graph)
        for name, role, function in functions
        for mode, graph in modes
    ]


def ours(case: GpuCase, backends: Sequence[str]) -> dict[str, Function]:
    """By each of the backends; whole models by whatever serves their operators."""

    def by(backend: str, *arguments: Any) -> torch.Tensor:
        with effattn.use_backend(backend):
            return case.ours(*arguments)

    return {OURS: case.ours} if case.compile_ours else {f"{OURS} {name}": partial(by, name) for name in backends}


def measure(case: GpuCase, ways: Sequence[Way], clock: WallClock, rounds: int, watch: Telling) -> list[Row]:
    """A row for each way, whatever happens to it, of which ``watch`` is told."""
    try:
        return _measure(case, ways, clock, rounds, watch)
    except Exception as error:  # of the inputs or the truth: there may be no memory for them
        rows = [new_row(case.suite, case, way.candidate, way.variant, way.role) for way in ways]
        for row in rows:
            row.reason = explain(error)
            watch.finish(row, error)
        return rows
    finally:
        torch._dynamo.reset()
        gc.collect()
        if clock.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _measure(case: GpuCase, ways: Sequence[Way], clock: WallClock, rounds: int, watch: Telling) -> list[Row]:
    rows, ready = [], []
    with torch.set_grad_enabled(case.training):
        with turns.preparing():
            first = on(clock.device, case.make())
            count = clock.sets(sum(t.nbytes for t in tensors(first)))
            sets = [first, *([_another(a, by) for a in first] for by in range(1, count))]
            grad_out, truth = expected(case, first)
        for way in ways:
            row = new_row(case.suite, case, way.candidate, way.variant, way.role)
            rows.append(row)
            watch.begin(row)
            try:
                sample = _admit(case, way, row, sets, grad_out, truth, clock)
            except Exception as error:
                row.reason = explain(error)
                watch.finish(row, error)
                continue
            watch.finish(row, None, provisional=sample is not None)
            if sample is not None:
                ready.append((row, sample))
        with turns.alone():
            if ready and rounds > 1:
                _warm(ready[0][1], clock)
            for _ in range(1, rounds):
                for row, sample in ready:
                    if row.reason is None:
                        watch.begin(row)
                        try:
                            row.samples.append(sample())
                        except Exception as error:
                            row.reason, row.milliseconds = explain(error), None
                            watch.finish(row, error)
    for row, _ in ready:
        if row.reason is None:
            row.milliseconds = statistics.median(row.samples)
            watch.finish(row, None)
    return rows


def expected(case: GpuCase, arguments: Arguments) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
    """The output's gradient, of a case of training, and what float64 makes of the arguments, where they are."""
    wide = [_wide(a) for a in arguments]
    with torch.no_grad():
        shape = case.truth(*wide).shape
    grad_out = None
    if case.training:
        grad_out = testing.make_tensor(*shape, seed=9).to(case.dtype).to(tensors(arguments)[0].device)
    return grad_out, step(case.truth, wide, None if grad_out is None else grad_out.double())()


def accuracy(case: GpuCase, role: Role, results: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> Accuracy:
    """The largest relative error of the output and the gradients."""
    # Not by the bounds of effattn/tolerance.py: they take the plain formulation in float64 five times on the CPU, which
    # for what is measured here lasts longer than the measuring. They decide in the tests, which run on the same GPU; a
    # gate keeps a mistake, which is off by a share of the result, from getting a time.
    is_loose = case.training and role is not Role.OURS and case.dtype != torch.float32
    allowed = PEER_GRADIENTS if is_loose else case.tolerance or GATE[case.dtype]
    norms = [torch.linalg.vector_norm(exact).item() for exact in truth]
    # A gradient that vanishes identically has no digits: it is measured against the others.
    least = LEAST_NORM * max(norms)
    errors = [
        tolerance.error(result, exact.to(result.device)) / max(norm, least)
        for result, exact, norm in zip(results, truth, norms, strict=True)
    ]
    return Accuracy(math.nan if any(math.isnan(e) for e in errors) else max(errors), allowed)


def same_bits(results: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """NaN is the same as itself, and 0 is not as -0."""
    pairs = zip(results, others, strict=True)
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


def _admit(
    case: GpuCase,
    way: Way,
    row: Row,
    sets: Sequence[Arguments],
    grad_out: torch.Tensor | None,
    truth: Sequence[torch.Tensor],
    clock: WallClock,
) -> Callable[[], float] | None:
    """What takes a sample, in milliseconds, and has taken the first one, if the first result is right."""
    with turns.preparing():
        function = way.function if way.mode is None else peers.compiled(way.function, way.mode)
        calls = [step(function, arguments, grad_out) for arguments in sets]
        results = calls[0]()  # compiles
        if way.role is not Role.CONTEXT:
            found = accuracy(case, way.role, results, truth)
            row.error, row.allowed_error = found.error, found.allowed
            if not found.passed:
                row.reason = f"wrong: relative error {found.error:.1e}, allowed {found.allowed:.1e}"
                return None
        # Whole models have others' kernels in them, which promise nothing.
        is_ours = way.role is Role.OURS and way.graph and not case.compile_ours
        if is_ours and not same_bits(results, clock.replayed(calls[0])):
            row.reason = f"wrong: {OTHER_BITS}"
            return None
        del results
        everything = clock.captured(calls) if way.graph else WallClock().captured(calls)
        everything()  # what brings graphs of its own captures them at its second call
        before = clock.clearing(sum(t.nbytes for arguments in sets for t in tensors(arguments)), way.graph)

    def sample() -> float:
        assert row.repeats is not None
        return clock.seconds(everything, row.repeats, before) / (row.repeats * len(sets)) * 1e3

    with turns.alone():
        _warm(everything, clock)
        row.repeats = max(1, math.ceil(SAMPLE_SECONDS / max(clock.seconds(everything, 1, before), 1e-9)))
        row.samples.append(sample())
    row.milliseconds = row.samples[0]
    return sample


def _warm(call: Callable[[], object], clock: WallClock) -> None:
    """Until the clocks are up, which were down while others compiled."""
    end = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < end:
        clock.seconds(call, 1)


def step(
    function: Function, arguments: Arguments, grad_out: torch.Tensor | None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The output, and for training the gradients of all arguments."""
    if grad_out is None:
        return lambda: (function(*arguments),)
    leaves = [[t.detach() for t in a] if isinstance(a, list) else a.detach() for a in arguments]
    flat = [t.requires_grad_() for t in tensors(leaves)]

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, flat, grad_out)

    return forward_and_backward


def tensors(arguments: Arguments) -> list[torch.Tensor]:
    return [t for a in arguments for t in (a if isinstance(a, list) else [a])]


def on(device: torch.device, arguments: Arguments) -> Arguments:
    return [[t.to(device) for t in a] if isinstance(a, list) else testing.moved(a, device) for a in arguments]


def _another(argument: Any, by: int) -> Any:
    """Of the same kind, elsewhere in memory, with other values where they are images'."""
    if isinstance(argument, list):
        return [t.clone() for t in argument]
    t = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=argument.device)
    return t.copy_(argument.roll(by, -1))


def _wide(argument: Any) -> Any:
    return [t.double() for t in argument] if isinstance(argument, list) else argument.double()
