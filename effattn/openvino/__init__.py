"""effattn's nodes in OpenVINO: an extension, compiled for the version that is installed, and models that have it.

The kernels are those that PyTorch uses; they work in the plugin's own threads. Without this module::

    core = openvino.Core()
    core.add_extension(str(effattn.openvino.library()))
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn import _library

if TYPE_CHECKING:
    import onnx
    import openvino

__all__ = ["compile", "library"]

_SOURCE = Path(__file__).with_name("extension.cpp")
#: Never unloaded, since operations of a model may outlive the core that loaded it.
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-z,nodelete")
#: What the extension is linked with, of the package's own libraries.
_LIBRARIES = ("libopenvino.so.", "libopenvino_onnx_frontend.so.", "libtbb.so.")


@cache
def library() -> Path:
    """The extension, for ``openvino.Core.add_extension``, of the OpenVINO that is installed.

    Compiled at the first call, in a few seconds, by ``$CXX`` or g++; kept in ``EFFATTN_CACHE``, by default
    ``~/.cache/effattn``. It loads ``libeffattn_kernels.so`` from where effattn is, and OpenVINO from where the
    package is.

    Raises:
        ImportError: without the package openvino.
        RuntimeError: without a compiler, or for a package without headers; with what the compiler said.
    """
    import openvino

    kernels = _library.required("libeffattn_kernels.so")
    package = Path(openvino.__file__).parent
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    linked = [str(path) for name in _LIBRARIES for path in sorted((package / "libs").glob(f"{name}*"))]
    if len(linked) != len(_LIBRARIES) or not (package / "include" / "openvino").exists():
        raise RuntimeError(
            f"effattn.openvino: the package openvino {openvino.__version__} in {package} has no headers or no "
            "libraries to compile against; pip install openvino brings both"
        )
    interface = kernels.parent / "include"
    command = [*_FLAGS, f"-I{interface}", f"-isystem{package / 'include'}"]
    command += [str(_SOURCE), str(kernels), *linked]
    command += [f"-Wl,-rpath,{kernels.parent}", f"-Wl,-rpath,{package / 'libs'}"]
    sources = (path.read_text() for path in (_SOURCE, interface / "effattn_kernels.h"))
    # Of any compiler: what one made serves where there is none.
    texts = (*command, openvino.get_version(), *sources)
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    target = _library.cache_folder() / "openvino" / key / "libeffattn_openvino.so"
    if not target.exists():
        _compile([*compiler, *command], target)
    return target


def _compile(command: list[str], target: Path) -> None:
    """Under another name first: who comes meanwhile finds all of it or nothing."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            try:
                done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            except OSError as error:
                text = f"effattn.openvino: no compiler ({error}): install g++, or name one by CXX"
                raise RuntimeError(text) from error
            if done.returncode != 0:
                text = f"effattn.openvino: {command[0]} cannot compile the extension:\n{done.stderr[-4000:]}"
                raise RuntimeError(text)
            os.replace(made, target)
    except OSError as error:
        raise RuntimeError(f"effattn.openvino: {error}; EFFATTN_CACHE names another folder") from error


def compile(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto | openvino.Model,
    device: str = "CPU",
    config: Mapping[str, Any] | None = None,
    *,
    core: openvino.Core | None = None,
) -> openvino.CompiledModel:
    """Compiles a model with effattn's nodes, or any other.

    Args:
        model: a path (ONNX or IR), the bytes of an ONNX file, what :func:`effattn.export.to_onnx` returns as
            ``.model``, or a model that is read already.
        device: as of ``openvino.Core.compile_model``; the nodes run on the CPU.
        config: as there: ``{"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}``. On processors with
            bfloat16, OpenVINO's own operations compute in it unless that hint says otherwise.
        core: which gets the extension, once; by default a new one.

    Raises:
        ImportError, RuntimeError: as :func:`library`; OpenVINO's own errors else.
    """
    import openvino

    core = core or openvino.Core()
    core.add_extension(str(library()))
    if not isinstance(model, openvino.Model):
        model = core.read_model(_bytes_or_path(model))
    return core.compile_model(model, device, dict(config or {}))


def _bytes_or_path(model: Any) -> bytes | str:
    if isinstance(model, bytes):
        return model
    return model.SerializeToString() if hasattr(model, "SerializeToString") else os.fspath(model)
