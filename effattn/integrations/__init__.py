"""``accelerate`` and ``restore``: existing models, the same weights, fused operators.

A module is known by its class name and its structure, so that no model library is imported. Its class
is exchanged and nothing else: parameters, buffers, hooks, state dict and the module's identity stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from effattn import nn as ours
from effattn.integrations import efficientformer, efficientvit_msra, lite_mla, sana
from effattn.nn.fold_cache import invalidate


@dataclass(frozen=True)
class _Known:
    """What an original of a certain class name becomes; ``resembles`` where others use that name for other things."""

    why_not: Callable[[Any], str | None]
    replacement: type
    resembles: Callable[[Any], bool] = lambda module: True


_WINDOWS = _Known(efficientvit_msra.why_not_windows, ours.LocalWindowAttention)
_V2 = _Known(efficientformer.why_not_v2, ours.EfficientFormerV2Attention)
_V2_DOWNSAMPLE = _Known(efficientformer.why_not_v2_downsample, ours.EfficientFormerV2AttentionDownsample)

# By the class name of the original.
_KNOWN = {
    "LiteMLA": _Known(lite_mla.why_not, ours.LiteMLA),
    "SanaMultiscaleLinearAttention": _Known(sana.why_not_multiscale, sana.SanaMultiscaleLinearAttention),
    "SanaLinearAttnProcessor2_0": _Known(sana.why_not_processor, sana.SanaLinearAttnProcessor),
    "CascadedGroupAttention": _Known(efficientvit_msra.why_not_cascade, ours.CascadedGroupAttention),
    "LocalWindowAttention": _WINDOWS,
    "Attention": _Known(efficientformer.why_not, ours.EfficientFormerAttention, efficientformer.resembles),
    "Attention2d": _V2,
    "Attention4D": _V2,
    "Attention2dDownsample": _V2_DOWNSAMPLE,
    "Attention4DDownsample": _V2_DOWNSAMPLE,
}

# Where a replaced module or processor keeps its original class.
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


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module by name, and what diffusers calls a processor: an object, no module, that does a module's work."""
    for name, module in model.named_modules():
        yield name or "(model)", module
        processor = module.__dict__.get("processor")
        if processor is not None:
            yield f"{name}.processor".lstrip("."), processor


def _why_not_this_class(module: Any) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if sum(base.__name__ == type(module).__name__ for base in type(module).__mro__) > 1:
        return "its class derives from another of that name"
    return None


def accelerate(model: nn.Module) -> Report:
    """Replaces, in place, every module of ``model`` that effattn knows.

    Known are, of timm and of the official repositories, the attention of EfficientViT (MIT: ``LiteMLA``), EfficientViT
    (Microsoft: ``CascadedGroupAttention``, ``LocalWindowAttention``), EfficientFormer (``Attention``) and
    EfficientFormerV2 (``Attention2d``, ``Attention2dDownsample``; officially ``Attention4D``), which become modules of
    :mod:`effattn.nn`; and of diffusers the ``SanaMultiscaleLinearAttention`` of DC-AE and the
    ``SanaLinearAttnProcessor2_0`` of Sana's transformer. Works in training and in evaluation, before or after loading
    weights. Hooks of a replaced module run as before. Its parts are not called any more, unless they are given hooks; a
    module whose parts have hooks already is left alone. :func:`restore` undoes it.

    Args:
        model: any module; it may itself be one of the known ones.

    Returns:
        A :class:`Report`; print it to see what happened.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    _check_model(model)
    report = Report()
    seen: set[int] = set()
    for name, module in _candidates(model):
        cls = type(module)
        if id(module) in seen:  # a processor of several modules
            continue
        seen.add(id(module))
        if _ORIGINAL in module.__dict__:
            report.left_alone.append(Entry(name, _path(module.__dict__[_ORIGINAL]), "accelerated already"))
            continue
        known = _KNOWN.get(cls.__name__)
        if known is None or not known.resembles(module):
            continue
        reason = "effattn's own" if cls is known.replacement else _why_not_this_class(module) or known.why_not(module)
        if reason is not None:
            report.left_alone.append(Entry(name, _path(cls), reason))
            continue
        module.__dict__[_ORIGINAL] = cls
        module.__class__ = known.replacement
        report.replaced.append(Entry(name, _path(cls), _path(known.replacement)))
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
    for _, module in _candidates(model):
        original = module.__dict__.pop(_ORIGINAL, None)
        if original is not None:
            module.__class__ = original
            if isinstance(module, nn.Module):
                invalidate(module)
                _forget_what_it_kept(module)
            count += 1
    return count


def _forget_what_it_kept(module: nn.Module) -> None:
    """The originals keep gathered biases until their mode changes, and some make them then."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(module.training)
    for part, training in modes:
        part.training = training


__all__ = ["Entry", "Report", "accelerate", "restore"]
