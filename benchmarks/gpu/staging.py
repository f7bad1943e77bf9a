"""Builds what is tested and measured, or takes what was brought along: ``python -m benchmarks.gpu.staging FOLDER``.

The package is staged in a folder of its own, whose libraries are for the GPU of EFFATTN_CUDA_ARCHS alone. Libraries in
``effattn/`` are taken if they load here, have code for that GPU and are made of the sources that are here; then
``_C`` is all that is compiled.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from benchmarks import environment
from benchmarks.gpu import child
from benchmarks.gpu.lines import Status
from benchmarks.runner import explain

PREBUILT = "prebuilt libraries"
BUILD = "build"


def native() -> ModuleType:
    """csrc/build.py."""
    spec = importlib.util.spec_from_file_location("effattn_native_build", environment.ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def why_not(folder: Path, builder: ModuleType, arch: str) -> str | None:
    """Why the libraries of a folder cannot be used on a GPU of this architecture ("90a"), or None."""
    import torch

    library, kernels, cuda = (
        folder / str(name) for name in (builder.LIBRARY, builder.KERNELS_LIBRARY, builder.CUDA_LIBRARY)
    )
    absent = [path.name for path in (library, kernels, cuda) if not path.exists()]
    if absent:
        return f"there is no {' and no '.join(absent)}"
    try:
        torch.ops.load_library(str(library))
        torch.ops.load_library(str(cuda))
        of_cpu, of_cuda = _told(library, "effattn_build"), _told(cuda, "effattn_cuda_build")
        of_kernels = _told(kernels, "effattn_kernels_build")
    except (OSError, AttributeError) as error:
        return explain(error)
    (compiler, digest), (nvcc, archs, cuda_digest) = (*of_cpu, "")[:2], (*of_cuda, "", "")[:3]
    known_of_cpu = builder.cpu_digest(compiler)
    pairs = ((digest, known_of_cpu), (of_kernels[-1], known_of_cpu), (cuda_digest, builder.cuda_digest(nvcc)))
    for made, known in pairs:
        if made != known:
            return f"they are made of other sources ({made or 'no digest'})"
    if arch not in archs.split():
        return f"they are compiled for {archs or 'no GPU'}, not for {arch}"
    return None


def _told(library: Path, name: str) -> list[str]:
    """What a library says of itself: compiler, for CUDA the GPUs that it is for, and digest of sources."""
    function = getattr(ctypes.CDLL(str(library)), name)
    function.restype = ctypes.c_char_p
    text: bytes = function()
    return text.decode().split("; ")


def main() -> None:
    folder = Path(sys.argv[1])
    done = child.start()
    child.plan([PREBUILT, BUILD])
    builder, source = native(), environment.ROOT / "effattn"
    reason: str | None = "there is no CUDA to build for"
    if PREBUILT in done:  # and ended the process before this one
        reason = "they cannot be loaded"
    elif os.environ.get("EFFATTN_CUDA") != "0":
        child.begin(PREBUILT)
        reason = why_not(source, builder, os.environ["EFFATTN_CUDA_ARCHS"].split()[0])
        if reason is None:
            child.finish(PREBUILT, Status.OK)
    if reason is not None and PREBUILT not in done:
        child.finish(PREBUILT, Status.SKIPPED, reason=reason)
    child.begin(BUILD)
    builder.stage(builder.Target.native(), folder, source if reason is None else None)
    child.finish(BUILD, Status.OK, built="_C" if reason is None else "everything")


if __name__ == "__main__":
    main()
