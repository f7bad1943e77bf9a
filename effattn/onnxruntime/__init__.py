"""effattn's nodes in onnxruntime, from version 1.17 on: a library of custom operators, and sessions that have it.

The kernels are those that PyTorch uses; they work in the session's own threads. Without this module::

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(effattn.onnxruntime.library()))
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn import _library

if TYPE_CHECKING:
    import onnx
    import onnxruntime

__all__ = ["library", "session"]


_registered: weakref.WeakSet[onnxruntime.SessionOptions] = weakref.WeakSet()


def library() -> Path:
    """The library of custom operators, for ``SessionOptions.register_custom_ops_library``; any language may load it.

    It needs ``libeffattn_kernels.so`` beside it, and nothing else.
    """
    return _library.required("libeffattn_onnxruntime.so")


def session(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto,
    options: onnxruntime.SessionOptions | None = None,
    *,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    **more: Any,
) -> onnxruntime.InferenceSession:
    """A session that runs a model with effattn's nodes, or any other.

    Args:
        model: a path, the bytes of a file, or what :func:`effattn.export.to_onnx` returns as ``.model``.
        options: in which the library is registered, once for all sessions; by default new ones, with all cores.
        providers: as of ``onnxruntime.InferenceSession``; the nodes run on the CPU.
        more: as of ``onnxruntime.InferenceSession``.

    Raises:
        ImportError: without the package onnxruntime.
        RuntimeError: if effattn was not compiled; onnxruntime's own errors else, among them one for onnxruntime before
            1.17, and for a model of another format than this version of effattn reads.
    """
    import onnxruntime

    options = options or onnxruntime.SessionOptions()
    if options not in _registered:  # a second time, no session could be created with them
        options.register_custom_ops_library(str(library()))
        _registered.add(options)
    given = model if isinstance(model, bytes) else _bytes_or_path(model)
    return onnxruntime.InferenceSession(given, options, providers=list(providers), **more)


def _bytes_or_path(model: Any) -> bytes | str:
    return model.SerializeToString() if hasattr(model, "SerializeToString") else os.fspath(model)
