"""One file an operator: its specification, of which :mod:`effattn.ops._operator` tells torch what it must know."""

import importlib as _importlib
import pkgutil as _pkgutil

from effattn.ops._operator import INFERENCE_OPERATORS, OPERATORS

for _module in _pkgutil.iter_modules(__path__, f"{__name__}."):
    _importlib.import_module(_module.name)

__all__ = ["INFERENCE_OPERATORS", "OPERATORS"]
