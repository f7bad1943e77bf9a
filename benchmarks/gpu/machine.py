"""The facts of the machine, as far as they can be had without effattn: ``python -m benchmarks.gpu.machine``."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from typing import Any

from benchmarks import environment
from benchmarks.gpu import child
from benchmarks.gpu.lines import Status

NAME = "machine"
#: What building, testing and measuring need beside Python: module, and the package that has it.
NEEDED = {
    **{name: name for name in ("torch", "triton", "setuptools", "pybind11", "ninja", "pytest", "hypothesis", "timm")},
    "tabulate": "tabulate",
}


def facts() -> dict[str, Any]:
    import torch

    changed = environment.git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    found: dict[str, Any] = {
        "date": environment.now(),
        # Results land in the tree themselves; they change no number. Without git nobody knows.
        "dirty": None if changed is None else bool(changed),
        "cpu": environment.cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": environment.version_of("triton"),
            "cuda": torch.version.cuda,
            "nvcc": _nvcc(),
            "timm": environment.version_of("timm"),
        },
        "missing": sorted(package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "driver": (
                _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
            ).split()[0],
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "tools": [tool for tool in ("nvcc", "compute-sanitizer", "ncu", "cuobjdump") if shutil.which(tool)],
        }
    return found


def _nvcc() -> str | None:
    text = _output("nvcc", "--version")
    match = re.search(r"release ([\d.]+)", text or "")
    return match[1] if match else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> None:
    child.start()
    child.begin(NAME)
    print(_output("nvidia-smi") or "there is no nvidia-smi")
    child.finish(NAME, Status.OK, **facts())


if __name__ == "__main__":
    main()
