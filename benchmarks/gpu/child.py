"""What a process of the run tells the one that started it: what it is about to do, and what became of it.

A record is a JSON object on a line of the pipe that EFFATTN_RECORDS names (without one, it is printed):

- ``{"plan": [NAME, ...]}``: all that this process would do
- ``{"begin": NAME, ...}``: what it does now, so that a crash or a hang can be told of, with these figures
- ``{"waits": true}`` and ``{"waits": false}``: for others' turn, from here to there; that time is not its own
- ``{"name": NAME, "status": STATUS, ...}``: what became of it, as in :mod:`benchmarks.gpu.lines`; with
  ``"provisional": true`` it is not done with yet

What is done already stands in the file that EFFATTN_DONE is the descriptor of: a process whose predecessor died does
the rest.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VARIABLE = "EFFATTN_RECORDS"
DONE_VARIABLE = "EFFATTN_DONE"
#: The status of a process whose GPU, or whose use of it, is lost to it: the rest is for another one.
STICKY = 75
#: What CUDA says of errors after which every later call fails.
_STICKY_TEXTS = re.compile(
    "illegal memory access|illegal instruction|misaligned address|unspecified launch failure|device-side assert"
    "|hardware stack error|invalid program counter|invalid address space|launch timed out|uncorrectable ECC"
    "|unknown error",
    re.IGNORECASE,
)
_PR_SET_PDEATHSIG = 1


def start() -> set[str]:
    """To be called first: the names of what is done already. From here on, the process ends with its parent."""
    if VARIABLE not in os.environ:
        return set()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        with os.fdopen(int(os.environ[DONE_VARIABLE]), closefd=False) as file:
            return set(json.load(file))
    except OSError:  # a profiler in between has closed it
        return set()


def plan(names: list[str]) -> None:
    _tell({"plan": names})


def begin(name: str, **figures: Any) -> None:
    _tell({"begin": name, **figures})


@contextmanager
def waiting() -> Iterator[None]:
    """For others of the run."""
    _tell({"waits": True})
    try:
        yield
    finally:
        _tell({"waits": False})


def finish(name: str, status: str, **figures: Any) -> None:
    _tell({"name": name, "status": status, **figures})


def says_sticky(error: BaseException | str) -> bool:
    """Whether an error's text is that of CUDA after which nothing works in this process any more."""
    return _STICKY_TEXTS.search(str(error)) is not None


def is_sticky(error: BaseException | str) -> bool:
    """The same, and the GPU is asked, whatever the text."""
    if says_sticky(error):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _tell(record: dict[str, Any]) -> None:
    text = (json.dumps(record) + "\n").encode()
    descriptor = int(os.environ.get(VARIABLE, "1"))
    while text:
        text = text[os.write(descriptor, text) :]
