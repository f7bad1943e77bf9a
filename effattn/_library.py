"""Loads the compiled parts, and keeps the reason when one cannot be loaded.

``libeffattn.so`` registers the operators with torch; ``_C`` holds build facts and plans. Without them
the package still works through the plain PyTorch reference, and says why in ``python -m effattn info``.
"""

from __future__ import annotations

import importlib
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
