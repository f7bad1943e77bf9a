"""Peak resident memory of one call, above what its inputs hold already.

The kernel keeps the high-water mark of a process (VmHWM) and sets it back to the present when 5 is written
to clear_refs. One call warms up (code pages, thread stacks, compilation), the mark is set back, the second
call counts. The allocator must give freed memory back at once (``environment.RETURN_MEMORY``), or the
warm-up's memory would be used again unseen; therefore each candidate has a process of its own.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from benchmarks.runner import Candidate, Case, Row, explain, new_row

PROCESS = Path("/proc/self")


def row(suite: str, case: Case, candidate: Candidate) -> Row:
    result = new_row(suite, case, candidate.name, candidate.variant, candidate.role, case.protocol.name)
    with torch.set_grad_enabled(case.training):
        try:
            call = candidate.build(case.prepare())
            call()
            gc.collect()
            before = _reset_peak()
            call()
            result.peak_bytes = _status("VmHWM") - before
        except Exception as error:
            result.reason = explain(error)
    return result


def _reset_peak() -> int:
    """Sets the high-water mark to what is resident now, and returns that."""
    (PROCESS / "clear_refs").write_text("5")
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in {PROCESS / 'status'}: peak memory is measured on Linux only")
