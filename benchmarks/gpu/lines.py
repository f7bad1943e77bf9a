"""The lines of a run: one JSON object for each thing that was tried, written when it is known and never rewritten.

Of two lines with the same stage and name the later one counts: what is measured has a line after its first sample, and
another one with all of them; the first one is ``provisional``. Every line has

- ``stage``, ``name``: "main", "gpu-attention: b1 stage 3 @1024x2048, bfloat16: effattn cuda, graph"
- ``status``: one of :class:`Status`; ``reason``: why it is not "ok"
- ``at``: seconds since the run began
- ``commit``, ``gpu``, ``driver``, ``versions`` (torch, triton, cuda, nvcc): "unknown" or None until the GPU was asked
- ``sm_clock``, ``memory_clock``: MHz, of at most a second ago; None without a GPU

and its figures: ``seconds`` of a process, ``error`` and ``allowed_error`` (relative to float64, by norm); of a
measurement ``row``, a :class:`benchmarks.runner.Row` (milliseconds with samples, bytes, flops); of a rate ``rates``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Status(StrEnum):
    OK = "ok"
    WRONG = "wrong"
    CRASHED = "crashed"
    TIMEOUT = "timeout"
    ERROR = "error"
    SKIPPED = "skipped"  # on purpose: quarantined, or not here
    NOT_RUN = "not run"  # no time was left


#: What is not as it should be.
FAILED = (Status.WRONG, Status.CRASHED, Status.TIMEOUT, Status.ERROR)


class Writer:
    """Appends lines to a file; each is on the disk when ``write`` returns.

    Args:
        common: what every line has, asked for at that moment.
    """

    def __init__(self, path: Path, common: Callable[[], Mapping[str, Any]]) -> None:
        self._file = path.open("w")
        self._common = common
        self._begin = time.monotonic()
        self.lines: list[Line] = []

    def write(self, stage: str, name: str, status: Status | str, **figures: Any) -> Line:
        at = round(time.monotonic() - self._begin, 3)
        line = {"stage": stage, "name": name, "status": str(Status(status)), "at": at, **self._common(), **figures}
        self.lines.append(line)
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return line


def _finite(value: Any) -> Any:
    """With None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(of) for key, of in value.items()}
    return [_finite(of) for of in value] if isinstance(value, list | tuple) else value


def read(path: Path) -> list[Line]:
    """The lines of a file; one that was not finished, the last of a run that was killed, is left out.

    Raises:
        ValueError: if another line is not one of ours.
    """
    texts = path.read_text().split("\n")
    found = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text) if text else None
        except ValueError as error:
            if number == len(texts):
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {text[:80]!r}") from error
        if line is not None:
            if not isinstance(line, dict) or not {"stage", "name", "status"} <= set(line):
                raise ValueError(
                    f"{path}, line {number}: expected a line with stage, name and status, got {text[:80]!r}"
                )
            found.append(line)
    return found


def latest(lines: Iterable[Line]) -> list[Line]:
    """Of each stage and name the line that counts, in the order in which they were begun."""
    return list({(line["stage"], line["name"]): line for line in lines}.values())
