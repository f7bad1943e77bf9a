"""Fused attention operators of the efficient vision transformers, for PyTorch.

from effattn import relu_linear_attention
effattn.accelerate(model)
"""

import warnings as _warnings

from effattn import _library, nn
from effattn.functional import (
    biased_attention,
    cascaded_group_attention,
    multi_scale_aggregation,
    multi_scale_linear_attention,
    relu_linear_attention,
)
from effattn.integrations import Report, accelerate, restore
from effattn.registry import backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "Report",
    "accelerate",
    "backends",
    "biased_attention",
    "cascaded_group_attention",
    "multi_scale_aggregation",
    "multi_scale_linear_attention",
    "nn",
    "relu_linear_attention",
    "restore",
    "use_backend",
]

if _library.error is not None:
    _warnings.warn(
        "effattn: the compiled library cannot be loaded, the plain PyTorch reference serves instead "
        f"({_library.error})",
        stacklevel=2,
    )
