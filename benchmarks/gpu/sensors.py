"""The card's clocks while others use it, read twice a second: a line must not wait for them."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import threading
from typing import Any

PERIOD = 0.5
_QUERY = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits", "-i", "0", "-lms"]


class Sensors:
    """``clocks`` is what was last read: MHz, or None. Nothing on the card is changed."""

    def __init__(self) -> None:
        self.clocks: dict[str, int | None] = {"sm_clock": None, "memory_clock": None}
        self._process: subprocess.Popen[str] | None = None
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()  # a driver that hangs is the thread's trouble alone

    def close(self) -> None:
        self._over.set()
        if self._process is not None:
            self._process.kill()

    def _keep(self, sm: int, memory: int) -> None:
        self.clocks = {"sm_clock": sm, "memory_clock": memory}

    def _watch(self) -> None:
        nvml = _nvml()
        if nvml is not None:
            self._poll(*nvml)
        elif shutil.which(_QUERY[0]) is not None:
            command = [*_QUERY, str(int(PERIOD * 1000))]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._follow()

    def _poll(self, nvml: Any, card: Any) -> None:
        while not self._over.wait(PERIOD):
            with contextlib.suppress(nvml.NVMLError):
                sm, memory = (nvml.nvmlDeviceGetClockInfo(card, c) for c in (nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM))
                self._keep(sm, memory)

    def _follow(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if self._over.is_set():
                self._process.kill()
            with contextlib.suppress(ValueError):
                sm, memory = map(int, line.split(","))
                self._keep(sm, memory)


def _nvml() -> tuple[Any, Any] | None:
    """pynvml, where it is installed and finds a driver, and the first card."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # of NVML, whose classes are there only if the module is
        return None
