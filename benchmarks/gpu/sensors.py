"""The GPU's clocks while others use it, as nvidia-smi reads them twice a second: a line must not wait for them."""

from __future__ import annotations

import contextlib
import subprocess
import threading

_QUERY = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits", "-i", "0", "-lms", "500"]


class Sensors:
    """``clocks`` is what was last read: MHz, or None. Nothing on the GPU is changed."""

    def __init__(self) -> None:
        self.clocks: dict[str, int | None] = {"sm_clock": None, "memory_clock": None}
        self._process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):  # where there is no nvidia-smi
            self._process = subprocess.Popen(
                _QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._follow, daemon=True).start()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _follow(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self.clocks["sm_clock"], self.clocks["memory_clock"] = map(int, line.split(","))
