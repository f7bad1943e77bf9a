"""How kernels fail, for a rehearsal: functions that take any arguments, and need no torch."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any, NoReturn


def crash(*arguments: Any) -> NoReturn:
    ctypes.string_at(0)
    raise AssertionError("an address that nobody may read was read")


def hang(*arguments: Any) -> NoReturn:
    while True:
        time.sleep(1)


def sticky(*arguments: Any) -> NoReturn:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def abort(*arguments: Any) -> NoReturn:
    os.abort()


#: Those that give no result; "wrong" gives one, and so depends on the case.
FAULTS: dict[str, Callable[..., NoReturn]] = {"crash": crash, "abort": abort, "hang": hang, "sticky": sticky}
WRONG = "wrong"
NAMES = (*FAULTS, WRONG)
