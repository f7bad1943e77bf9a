"""Sizes at which an operator's node is compared with standard operators: a file an operator, named after it."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

#: By operator and by what tables call them.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").SIZES for module in pkgutil.iter_modules(__path__)
}
