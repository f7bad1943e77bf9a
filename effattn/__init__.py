"""Fused attention operators of the efficient vision transformers, for PyTorch.

effattn.accelerate(model) replaces the attention of models that are known; the operators are functions of their own.
"""

import warnings as _warnings

from effattn import _library, nn
from effattn import functional as _functional
from effattn.functional import *  # noqa: F403
from effattn.integrations import Report, accelerate, restore
from effattn.registry import backends, use_backend

__version__ = "0.1.0"

__all__ = ["Report", "accelerate", "backends", "nn", "restore", "use_backend", *_functional.__all__]

if _library.error is not None:
    _warnings.warn(
        "effattn: the compiled library cannot be loaded, the plain PyTorch reference serves instead "
        f"({_library.error})",
        stacklevel=2,
    )
