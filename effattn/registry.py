"""Which backend serves a call, by the operator, the device, the dtype, a few sizes and whether the call is small.

One check both chooses and explains: a backend answers with every reason why it cannot serve, and no
reason means that it can. The first that can, in the order of
:func:`effattn.backends.order`, does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from effattn import verdicts
from effattn.backends import ORDER, SMALL_CALL, Backend, order
from effattn.backends._base import refused_dtype
from effattn.verdicts import Verdict

ENVIRONMENT_VARIABLE = "EFFATTN_BACKEND"
Result = TypeVar("Result")


@dataclass(frozen=True)
class BackendStatus:
    """One line of :func:`backends`: ``reason`` is None where the backend can serve on this machine."""

    name: str
    reason: str | None

    @property
    def available(self) -> bool:
        return self.reason is None


def backends() -> list[BackendStatus]:
    """Every backend in the order of preference, with the reason why it cannot serve here, if any."""
    return [BackendStatus(backend.name, backend.unavailable()) for backend in ORDER]


def explain_order() -> str:
    """What the order of :func:`backends` leaves out, in a line."""
    return (
        f"on a GPU cuda is asked before triton, whose launches cost more, if a call's activations together "
        f"have fewer than {SMALL_CALL} elements"
    )


def explain_devices() -> dict[str, dict[str, list[str]]]:
    """By GPU and backend that is available here: every reason why its kernels do not run there; none if they do."""
    found = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found[f"{device}, {torch.cuda.get_device_name(device)}"] = {
            backend.name: backend.reasons(None, device, torch.bfloat16, ())
            for backend in ORDER
            if backend.identity is not None and backend.unavailable() is None
        }
    return found


def failed() -> list[Verdict]:
    """The kernels that were found to fail on a GPU of this machine, and for which the next backend serves."""
    return verdicts.here()


def verdict_file() -> Path | None:
    """Where they are read from; None if ``EFFATTN_VERDICTS`` is empty."""
    return verdicts.path()


def _named(name: str, asked_by: str) -> Backend:
    for backend in ORDER:
        if backend.name == name:
            return backend
    names = ", ".join(repr(backend.name) for backend in ORDER)
    raise ValueError(f"{asked_by}: expected one of {names}, got {name!r}")


class Facts(NamedTuple):
    """What dispatch needs to know of an operator.

    Args:
        dtypes: of activations, which its kernels take; fewer, perhaps, than those of their backend.
        limits: of each of the sizes that :func:`find` is given, the name of the limit that a backend may have for it.
    """

    dtypes: Sequence[torch.dtype]
    limits: Sequence[str]


#: By operator.
FACTS: dict[str, Facts] = {}

# What the environment asks for; None lets the registry pick.
_default: str | None = None
if os.environ.get(ENVIRONMENT_VARIABLE):
    _default = _named(os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE).name
# The blocks of use_backend() that are open, whichever threads opened them, by a key of their own; the latest last.
_blocks: dict[object, str] = {}
_lock = threading.Lock()
# The backend of the latest block, or the default.
_forced = _default

# Caches of choose() and choose_fused(), for eager calls; the first of a key is the forced backend.
_chosen: dict[tuple[str | None, str, torch.device, torch.dtype, Sequence[int], bool], Backend] = {}
_fused: dict[tuple[str | None, str, torch.device, torch.dtype], bool] = {}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every call inside the block, in all threads.

    Of blocks that several threads have open, the one opened last decides.

    Args:
        name: ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"reference"`` (see :func:`backends`).

    Raises:
        ValueError: for an unknown name. A call that the backend cannot serve raises
            :class:`RuntimeError` with all its reasons.
    """
    global _forced
    backend = _named(name, "use_backend").name
    if torch.compiler.is_compiling():  # by one thread, in a graph that can hold neither a lock nor a key
        before, _forced = _forced, backend
        try:
            yield
        finally:
            _forced = before
        return
    block = object()
    with _lock:
        _blocks[block] = _forced = backend
    try:
        yield
    finally:
        with _lock:
            del _blocks[block]
            _forced = next(reversed(_blocks.values()), _default)


def _reasons(backend: Backend, op: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int]) -> list[str]:
    unavailable = backend.unavailable()
    facts = FACTS.get(op, Facts((), ()))
    named = list(zip(facts.limits, sizes, strict=True)) if sizes else []
    reasons = ([unavailable] if unavailable is not None else []) + backend.reasons(op, device, dtype, named)
    if backend is not ORDER[-1] and facts.dtypes:
        reasons += refused_dtype(dtype, facts.dtypes)
    reasons = list(dict.fromkeys(reasons))
    if not reasons:
        verdict = verdicts.reason(backend.name, op, device, dtype)
        reasons = [] if verdict is None else [verdict]
    return reasons


def find(
    op: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = (), *, is_small: bool = False
) -> Backend:
    """The backend that serves ``op`` for tensors of ``dtype`` on ``device``, of these sizes.

    For an ONNX exporter it is the reference, whose operations every runtime has.

    Args:
        sizes: those that backends may have a limit for, in the order of :class:`Facts`; empty where they do not matter.
        is_small: what :func:`effattn.backends.is_small_call` says of the call.

    Raises:
        RuntimeError: if none can, listing every candidate with all its reasons.
    """
    return _find(_wanted(), op, device, dtype, sizes, is_small)


def _find(
    forced: str | None, op: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int], is_small: bool
) -> Backend:
    backend, refusals = _search(forced, op, device, dtype, sizes, is_small)
    if backend is None:
        message = f"effattn.{op}: no backend can serve {dtype} on {device.type}:\n"
        raise RuntimeError(message + "\n".join(refusals))
    return backend


def choose(
    op: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = (), is_small: bool = False
) -> Backend:
    """:func:`find` that remembers: for eager calls, which it must not hold up.

    Not while compiling or tracing, where a table that grows would be a guard that fails, and sizes are no numbers.
    """
    key = (_forced, op, device, dtype, sizes, is_small)
    backend = _chosen.get(key)
    return _remembered(_chosen, key, _find) if backend is None else backend


def find_fused(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend with kernels serves ``op``; for operators of whole modules, made of others where none does."""
    return _is_fused(_wanted(), op, device, dtype)


def _is_fused(forced: str | None, op: str, device: torch.device, dtype: torch.dtype) -> bool:
    backend, _ = _search(forced, op, device, dtype, (), is_small=False)
    return backend is not None and backend is not ORDER[-1]


def choose_fused(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """:func:`find_fused` that remembers, like :func:`choose`."""
    key = (_forced, op, device, dtype)
    is_fused = _fused.get(key)
    return _remembered(_fused, key, _is_fused) if is_fused is None else is_fused


def _wanted() -> str | None:
    """The one backend to be asked, if any: in an ONNX export the reference, whose operations every runtime has."""
    return ORDER[-1].name if torch.onnx.is_in_onnx_export() else _forced


def _remembered(cache: dict[Any, Result], key: tuple[Any, ...], answer: Callable[..., Result]) -> Result:
    """The answer, which the cache gets too; an ONNX export's is no other call's."""
    if torch.onnx.is_in_onnx_export():
        return answer(ORDER[-1].name, *key[1:])
    result = cache[key] = answer(*key)
    return result


def _search(
    forced: str | None, op: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int], is_small: bool
) -> tuple[Backend | None, list[str]]:
    """The backend, if any, and what those in front of it said."""
    candidates = order(is_small=is_small) if forced is None else (_named(forced, "use_backend"),)
    refusals: list[str] = []
    for backend in candidates:
        reasons = _reasons(backend, op, device, dtype, sizes)
        if not reasons:
            return backend, refusals
        refusals.append(f"  {backend.name}: {'; '.join(reasons)}")
    return None, refusals
