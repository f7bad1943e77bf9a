"""The process that measures (allocator, compile cache) and the machine it measures on.

Nothing here imports torch at the top: the allocator reads its variables when the process starts, so the
process may have to start again before anything heavy is loaded.
"""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: Keeps freed memory in the process. With glibc's own settings a large activation is mapped and unmapped
#: on every call, and a benchmark compares page faults.
KEEP_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
#: Gives every tensor above 128 KiB back to the system as soon as it is freed, so that resident memory is
#: the memory in use. Naming the default threshold also stops glibc from raising it on the way.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072"}

#: A folder to keep what was compiled from run to run; children of a run find the run's folder in it.
CACHE_VARIABLE = "EFFATTN_BENCHMARK_CACHE"

#: Packages whose version decides a number.
PEERS = (
    "torch",
    "triton",
    "onnx",
    "onnxruntime",
    "openvino",
    "ai-edge-litert",
    "litert-torch",
    "executorch",
    "timm",
    "numpy",
)


def restart_with_kept_heap() -> None:
    """Starts this process again, once, with ``KEEP_HEAP``; returns if it is set already."""
    if all(os.environ.get(name) == value for name, value in KEEP_HEAP.items()):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | KEEP_HEAP)


def with_allocator(variables: dict[str, str]) -> dict[str, str]:
    """The environment of a child process whose allocator has these settings and no others."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables


def use_private_compile_cache() -> None:
    """Compiles into a folder of this run, shared with its children and removed at its end; or into the one that
    EFFATTN_BENCHMARK_CACHE names, which stays: whole models take minutes each."""
    if CACHE_VARIABLE not in os.environ:
        os.environ[CACHE_VARIABLE] = tempfile.mkdtemp(prefix="effattn-benchmarks-")
        atexit.register(shutil.rmtree, os.environ[CACHE_VARIABLE], ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ[CACHE_VARIABLE]


def facts() -> dict[str, Any]:
    """What a number depends on, for the results file."""
    import torch

    import effattn

    isa = None if effattn._library._C is None else effattn._library._C.active_isa()
    flags = _cpu_field("flags").split()
    return {
        "date": now(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        "cpu_flags": [flag for flag in flags if flag.startswith(("avx", "amx", "fma", "f16c"))],
        "system": platform.system(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD"),
        # Results land in the tree themselves; they change no number.
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "effattn": effattn.__version__,
        "isa": isa,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {name: version_of(name) for name in PEERS},
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "load_average": load_average(),
    }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def load_average() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def cpu_model() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """The answer of git about the repository; None outside of one."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
