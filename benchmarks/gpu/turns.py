"""Whose turn it is, where processes of a run share a GPU and its host: torch.compile of several cases, side by side.

Who prepares (inputs, compiling, checks, captures) holds a lock that others who prepare may hold too; who takes a time
holds it alone. So nothing of the run compiles or uses the GPU while one of its processes is timed: a compiler on the
same host disturbs those above all whose launches cost more than their kernels.

A process that waits for its samples goes before those that would begin to prepare. What it waits for is what others
have begun, a candidate each; then all who are ready are timed one after the other, which takes milliseconds, and all
who are left prepare their next candidate. Compiling is as parallel as without a lock, but for the ends of these rounds;
a slow compiler costs others their wait and not their samples, as it would if all was compiled first. Importing torch is
under no lock, so all processes are started at once; and each compiles by itself, with no workers that would go on
outside of its turn.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import torch

from benchmarks.gpu import child, names


@contextmanager
def preparing() -> Iterator[None]:
    """Beside others who prepare; not within :func:`alone`, nor that within this."""
    with _held(fcntl.LOCK_SH):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """As long as this lasts, no other process of the run prepares or is timed."""
    with _held(fcntl.LOCK_EX):
        yield


@contextmanager
def _held(kind: int) -> Iterator[None]:
    path = os.environ.get(names.GPU_LOCK)
    if path is None:
        yield
        return
    with open(path, "a") as lock:
        # One who waits to be alone keeps the queue, and those behind it.
        with open(f"{path}.queue", "a") as queue:
            _acquire(queue, kind)
            _acquire(lock, kind)
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # before the next one's turn


def _acquire(file: IO[str], kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        with child.waiting():
            fcntl.flock(file, kind)
