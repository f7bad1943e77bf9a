"""``accelerate`` and ``restore``: existing models, the same weights, fused operators.

A module is known by its class name and its structure, so that no model library is imported. Its class
is exchanged and nothing else: parameters, buffers, hooks, state dict and the module's identity stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from effattn.integrations import lite_mla
from effattn.nn import LiteMLA

# Class name of the original -> (why this one cannot be replaced or None, the class that replaces it).
_KNOWN: dict[str, tuple[Callable[[nn.Module], str | None], type[nn.Module]]] = {
    "LiteMLA": (lite_mla.why_not, LiteMLA),
}

# Where a replaced module keeps its original class.
_ORIGINAL = "_effattn_original_class"


@dataclass(frozen=True)
class Entry:
    """One module: its name in the model, its original class, and what became of it or why not."""

    module: str
    original: str
    detail: str


@dataclass
class Report:
    """What :func:`accelerate` replaced, by what, and what it left alone and why."""

    replaced: list[Entry] = field(default_factory=list)
    left_alone: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"effattn.accelerate: {len(self.replaced)} replaced, {len(self.left_alone)} left alone"]
        lines += [f"  {entry.module}: {entry.original} -> {entry.detail}" for entry in self.replaced]
        lines += [f"  {entry.module}: {entry.original} left alone, {entry.detail}" for entry in self.left_alone]
        return "\n".join(lines)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module) -> Report:
    """Replaces, in place, every module of ``model`` that effattn knows.

    Known are the ``LiteMLA`` of timm (efficientvit_b*, efficientvit_l*) and of the official EfficientViT
    repository, which become :class:`effattn.nn.LiteMLA`. Works in training and in evaluation, before or after
    loading weights. Hooks of a replaced module run as before; its parts are not called any more, so a module
    whose parts have hooks is left alone. :func:`restore` undoes it.

    Args:
        model: any module; it may itself be one of the known ones.

    Returns:
        A :class:`Report`; print it to see what happened.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    _check_model(model)
    report = Report()
    for name, module in model.named_modules():
        cls = type(module)
        name = name or "(model)"
        if _ORIGINAL in module.__dict__:
            report.left_alone.append(Entry(name, _path(module.__dict__[_ORIGINAL]), "accelerated already"))
        elif cls.__name__ in _KNOWN:
            why_not, replacement = _KNOWN[cls.__name__]
            reason = "effattn's own" if cls is replacement else why_not(module)
            if reason is not None:
                report.left_alone.append(Entry(name, _path(cls), reason))
                continue
            module.__dict__[_ORIGINAL] = cls
            module.__class__ = replacement
            report.replaced.append(Entry(name, _path(cls), _path(replacement)))
    return report


def restore(model: nn.Module) -> int:
    """Gives every module that :func:`accelerate` replaced its original class back.

    Returns:
        How many modules were restored.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    _check_model(model)
    count = 0
    for module in model.modules():
        original = module.__dict__.pop(_ORIGINAL, None)
        if original is not None:
            module.__class__ = original
            module.__dict__.pop("_effattn_folded", None)
            count += 1
    return count


__all__ = ["Entry", "Report", "accelerate", "restore"]
