"""Fused attention operators of the efficient vision transformers, for PyTorch.

effattn.accelerate(model) replaces the attention of models that are known; the operators are functions of their own.
"""

import importlib as _importlib
import warnings as _warnings
from typing import Any as _Any

from effattn import _library, nn
from effattn import functional as _functional
from effattn.functional import *  # noqa: F403
from effattn.integrations import Report, accelerate, restore
from effattn.registry import backends, use_backend

__version__ = "0.1.0"

__all__ = ["Report", "accelerate", "backends", "nn", "restore", "use_backend", *_functional.__all__]


def __getattr__(name: str) -> _Any:
    """Imports what needs further packages when it is asked for: export, onnxruntime, openvino."""
    if name not in ("export", "onnxruntime", "openvino"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _importlib.import_module(f"{__name__}.{name}")


if _library.error is not None:
    _warnings.warn(
        "effattn: the compiled library cannot be loaded, the plain PyTorch reference serves instead "
        f"({_library.error})",
        stacklevel=2,
    )
