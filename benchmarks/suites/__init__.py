"""The suites by name: those that the files here define. Another operator, module or model adds a file."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.suites.base import Settings, TimedSuite
from benchmarks.suites.processes import ProcessSuite

__all__ = ["SUITES", "Settings", "TimedSuite"]

SUITES: dict[str, TimedSuite | ProcessSuite] = {}
for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    _defined = vars(importlib.import_module(_module.name)).values()
    SUITES |= {suite.name: suite for suite in _defined if isinstance(suite, (TimedSuite, ProcessSuite))}
