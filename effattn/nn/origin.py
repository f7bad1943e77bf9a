"""Whose code a class has: one that is known by its name must also be the one that has this name."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Whose classes are known by name.
LIBRARIES = ("effattn", "timm", "diffusers", "torchvision", "detectron2")

#: Classes of nobody's library that gave the right answers (:mod:`effattn.integrations.structure`).
tried: set[type] = set()


def is_of(function: Any, *libraries: str) -> bool:
    """Whether a function was defined in one of these packages; a wrapper says otherwise, but its globals do not."""
    namespace = getattr(function, "__globals__", {})
    return (namespace.get("__name__") or "").partition(".")[0] in libraries


def is_genuine(cls: type[nn.Module]) -> bool:
    """Whether what a module of this class computes is known by the name of its class."""
    return cls in tried or is_of(cls.forward, *LIBRARIES)


#: Where a module whose class was exchanged keeps its original one.
ORIGINAL = "_effattn_original_class"


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before :func:`effattn.accelerate` exchanged it."""
    found: type[nn.Module] = module.__dict__.get(ORIGINAL, type(module))
    return found
