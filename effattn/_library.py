"""Loads the compiled parts, and keeps the reason when one cannot be loaded.

``libeffattn.so`` registers the operators with torch; ``_C`` holds build facts and plans. Without them
the package still works through the plain PyTorch reference, and says why in ``python -m effattn info``.
``libeffattn_cuda.so``, which may be missing, adds the same operators for tensors on CUDA devices.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from pathlib import Path
from types import ModuleType

import torch

library_path = Path(__file__).parent / "libeffattn.so"


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        torch.ops.load_library(str(library_path))
        return importlib.import_module("effattn._C"), None
    except (OSError, ImportError) as error:
        return None, f"{type(error).__name__}: {error}"


_C, error = _load()


def required(name: str) -> Path:
    """A compiled library beside this file; RuntimeError if it is not there."""
    path = library_path.with_name(name)
    if not path.exists():
        raise RuntimeError(f"effattn: there is no {path}: effattn was not compiled, or by an earlier version")
    return path


def cache_folder() -> Path:
    """Where effattn keeps what it makes once: EFFATTN_CACHE, or the user's cache."""
    named, of_user = os.environ.get("EFFATTN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(named) if named else (Path(of_user) if of_user else Path.home() / ".cache") / "effattn"
    return folder.absolute()


def _kernels() -> ctypes.CDLL:
    """The CPU kernels by their C interface (include/effattn_kernels.h)."""
    return ctypes.CDLL(str(required("libeffattn_kernels.so")))


def node_format() -> int:
    """Of effattn's nodes in ONNX graphs: what the libraries for other engines read."""
    return int(_kernels().effattn_format())


def node_operators() -> list[str]:
    """The operators of which there are nodes."""
    ask = _kernels().effattn_operations
    ask.restype = ctypes.POINTER(ctypes.c_char_p)
    names = []
    for name in ask():
        if name is None:
            break
        names.append(name.decode())
    return names


def operators(key: str) -> frozenset[str]:
    """The operators that the loaded libraries have kernels of for a dispatch key, by the name of their function."""
    names = (
        name.removeprefix("effattn::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("effattn::")
    )
    return frozenset(
        name.removesuffix("_forward")
        for name in names
        if not name.endswith("_backward") and torch._C._dispatch_has_kernel_for_dispatch_key(f"effattn::{name}", key)
    )


def _load_cuda() -> tuple[str, str, str | None]:
    """What the library of CUDA kernels was built with, and for, and its limits; or why it cannot be used."""
    path = library_path.with_name("libeffattn_cuda.so")
    if error is not None:
        return "", "", error
    if not path.exists():
        reason = "is not compiled in: that takes an nvcc and a torch with CUDA, or EFFATTN_CUDA=1 when effattn is built"
        return "", "", reason
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as failure:
        return "", "", f"{type(failure).__name__}: {failure}"
    texts = (library.effattn_cuda_build, library.effattn_cuda_limits)
    for text in texts:
        text.restype = ctypes.c_char_p
    build, limits = (text().decode() for text in texts)
    return build, limits, None


def cuda_driver_error() -> str | None:
    """Why the driver cannot run the CUDA kernels; where there is a GPU, and the library is loaded."""
    ask = ctypes.CDLL(str(library_path.with_name("libeffattn_cuda.so"))).effattn_cuda_driver
    ask.restype = ctypes.c_char_p
    return ask().decode() or None


_cuda_build, _cuda_limits, cuda_error = _load_cuda()
cuda_compiler, _archs, cuda_digest = (*_cuda_build.split("; "), "", "")[:3]
#: ``cuda_digest``: of the sources of the CUDA kernels and their compiler (csrc/build.py).
#: What the CUDA kernels are compiled for, as EFFATTN_CUDA_ARCHS has it.
cuda_archs = tuple(_archs.split())
#: Their operators, and the largest sizes of a call that each takes, by name.
cuda_limits: dict[str, dict[str, int]] = {name: {} for name in _cuda_limits.split() if "=" not in name}
for _limit in _cuda_limits.split():
    if "=" in _limit:
        _op, _size, _max = re.split("[.=]", _limit)
        cuda_limits[_op][_size] = int(_max)
#: Whether they run on the host, for tests.
cuda_is_emulated = cuda_compiler == "emulated"
