"""Takes a case and the ways to compute it, lets through who is right, and times them in turn."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import effattn
from benchmarks import peers
from benchmarks.floor import Work
from benchmarks.gpu.clock import SAMPLE_SECONDS, Call, Clock
from benchmarks.runner import Role, Row, explain
from effattn import testing

Arguments = Sequence[Any]  # tensors, and lists of them
Function = Callable[..., torch.Tensor]

#: Relative error (norm) of an output or a gradient: far above its rounding, far below any mistake.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
#: The same of a peer's gradients in a narrow type: what it rounds between its parts opens and shuts relus.
PEER_GRADIENTS = 0.5
LEAST_NORM = 1e-3
OURS, STOCK = "effattn", "stock"


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


def ways(case: GpuCase, compiled: bool = True) -> list[Way]:
    """Everyone in every setting; ``reduce-overhead`` and ``max-autotune`` bring graphs of their own."""
    found = []
    for graph in (True, False):
        variant = "graph" if graph else "calls"
        for name, function in _ours(case.ours).items():
            found.append(Way(name, variant, Role.OURS, function, graph=graph))
        for name, function in case.peers.items():
            found.append(Way(f"{name} eager", variant, Role.PEER, function, graph=graph))
            if compiled:
                found.append(Way(f"{name} compiled", variant, Role.PEER, function, "default", graph))
        for name, function in case.context.items():
            found.append(Way(name, variant, Role.CONTEXT, function, graph=graph))
    stock = next(iter(case.peers))
    found.append(Way(f"{stock} eager (again)", "graph", Role.CHECK, case.peers[stock], graph=True))
    functions = [(name, Role.PEER, function) for name, function in case.peers.items()]
    if case.compile_ours:
        functions.append((OURS, Role.OURS, case.ours))
    for name, role, function in functions if compiled else ():
        for mode in ("reduce-overhead", "max-autotune"):
            found.append(Way(f"{name} {mode}", "calls", role, function, mode))
        captured = "max-autotune-no-cudagraphs"
        found.append(Way(f"{name} max-autotune", "graph", role, function, captured, graph=True))
    return found


def _ours(function: Function) -> dict[str, Function]:
    """By each backend for cards, where there are several; what the registry's table of them is made from."""
    here = [b.name for b in effattn.backends() if b.available and b.name in ("triton", "cuda")]

    def by(backend: str, *arguments: Any) -> torch.Tensor:
        with effattn.use_backend(backend):
            return function(*arguments)

    return {f"{OURS} {name}": partial(by, name) for name in here} if len(here) > 1 else {OURS: function}


def measure(
    case: GpuCase, clock: Clock, rounds: int, compiled: bool = True, is_over: Callable[[], bool] = lambda: False
) -> list[Row]:
    """A row for each way, whatever happens to it; none is begun once time ``is_over``; a round is timed in any case."""
    try:
        return _measure(case, clock, rounds, compiled, is_over)
    except Exception as error:  # of the inputs or the truth: there may be no memory for them
        rows = [_new_row(case, way) for way in ways(case, compiled)]
        for row in rows:
            row.reason = explain(error)
        return rows
    finally:
        torch._dynamo.reset()
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(case: GpuCase, clock: Clock, rounds: int, compiled: bool, is_over: Callable[[], bool]) -> list[Row]:
    first = _on(clock.device, case.make())
    count = clock.sets(sum(t.nbytes for t in _tensors(first)))
    sets = [first, *([_another(a, by) for a in first] for by in range(1, count))]
    rows, ready = [], []
    with torch.set_grad_enabled(case.training):
        wide = [_wide(a) for a in first]
        with torch.no_grad():
            shape = case.truth(*wide).shape
        grad_out = testing.make_tensor(*shape, seed=9).to(case.dtype).to(clock.device) if case.training else None
        truth = _step(case.truth, wide, None if grad_out is None else grad_out.double())()
        for way in ways(case, compiled):
            row = _new_row(case, way)
            rows.append(row)
            if is_over():
                row.reason = "no time was left"
                continue
            call = _admit(case, way, row, sets, grad_out, truth, clock)
            if call is not None:
                ready.append((row, call))
        for round_ in range(rounds):
            if round_ > 0 and is_over():
                break
            for row, call in ready:
                if row.reason is None:
                    try:
                        assert row.repeats is not None
                        seconds = clock.seconds(call, row.repeats) / (row.repeats * len(sets))
                        row.samples.append(seconds * 1e3)
                    except Exception as error:
                        row.reason = explain(error)
    for row in rows:
        if row.reason is None:
            row.milliseconds = statistics.median(row.samples)
    return rows


def _admit(
    case: GpuCase,
    way: Way,
    row: Row,
    sets: Sequence[Arguments],
    grad_out: torch.Tensor | None,
    truth: Sequence[torch.Tensor],
    clock: Clock,
) -> Call | None:
    """All sets as one call, if the first result is right."""
    try:
        function = way.function if way.mode is None else peers.compiled(way.function, way.mode)
        calls = [_step(function, arguments, grad_out) for arguments in sets]
        if way.role is not Role.CONTEXT:
            is_loose = case.training and way.role is not Role.OURS and case.dtype != torch.float32
            row.allowed_error = PEER_GRADIENTS if is_loose else case.tolerance or TOLERANCE[case.dtype]
            norms = [torch.linalg.vector_norm(expected).item() for expected in truth]
            # A gradient that vanishes identically has no digits: it is measured against the others.
            least = LEAST_NORM * max(norms)
            row.error = max(
                testing.error(result, expected) / max(norm, least)
                for result, expected, norm in zip(calls[0](), truth, norms, strict=True)
            )
            if not row.error <= row.allowed_error:
                row.reason = f"wrong: relative error {row.error:.1e}, allowed {row.allowed_error:.1e}"
                return None
        everything = clock.captured(calls) if way.graph else _in_turn(calls)
        everything()
        row.repeats = max(1, math.ceil(SAMPLE_SECONDS / max(clock.seconds(everything, 1), 1e-9)))
    except Exception as error:
        row.reason = explain(error)
        return None
    return everything


def _in_turn(calls: Sequence[Call]) -> Call:
    def everything() -> None:
        for call in calls:
            call()

    return everything


def _step(
    function: Function, arguments: Arguments, grad_out: torch.Tensor | None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The output, and for training the gradients of all arguments."""
    if grad_out is None:
        return lambda: (function(*arguments),)
    leaves = [[t.detach() for t in a] if isinstance(a, list) else a.detach() for a in arguments]
    flat = [t.requires_grad_() for t in _tensors(leaves)]

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, flat, grad_out)

    return forward_and_backward


def _tensors(arguments: Arguments) -> list[torch.Tensor]:
    return [t for a in arguments for t in (a if isinstance(a, list) else [a])]


def _on(device: torch.device, arguments: Arguments) -> Arguments:
    return [[t.to(device) for t in a] if isinstance(a, list) else testing.moved(a, device) for a in arguments]


def _another(argument: Any, by: int) -> Any:
    """Of the same kind, elsewhere in memory, with other values where they are images'."""
    if isinstance(argument, list):
        return [t.clone() for t in argument]
    t = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=argument.device)
    return t.copy_(argument.roll(by, -1))


def _wide(argument: Any) -> Any:
    return [t.double() for t in argument] if isinstance(argument, list) else argument.double()


def _new_row(case: GpuCase, way: Way) -> Row:
    return Row(
        suite=case.suite,
        case=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        sizes=case.sizes,
        candidate=way.candidate,
        variant=way.variant,
        role=way.role.value,
        bytes=case.work.bytes,
        flops=case.work.flops,
    )
