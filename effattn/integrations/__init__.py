"""``accelerate`` and ``restore``: existing models, the same weights, fused operators.

A module is known by its class name and by all that it is made of, so that no model library is imported. Its class
is exchanged and nothing else: parameters, buffers, hooks, state dict and the module's identity stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from effattn import nn as ours
from effattn.integrations import blocks, efficientformer, efficientvit_msra, lite_mla, sana
from effattn.integrations.structure import Original, why_not_its_answers, why_not_this_class
from effattn.nn.block import GRAPH, Block, block_class
from effattn.nn.fold_cache import invalidate
from effattn.nn.origin import ORIGINAL


@dataclass(frozen=True)
class _Known:
    """What an original becomes, and its form with tables for dense prediction, if there is one."""

    original: Original
    replacement: type
    dense: Original | None = None
    #: Others use that class name for other things.
    common_name: bool = False

    def original_of(self, module: nn.Module) -> Original:
        return self.dense if self.dense is not None and hasattr(module, "attention_biases_seg") else self.original


_V2 = _Known(efficientformer.V2, ours.EfficientFormerV2Attention, efficientformer.V2_DENSE)
_V2_DOWNSAMPLE = _Known(
    efficientformer.V2_DOWNSAMPLE,
    ours.EfficientFormerV2AttentionDownsample,
    efficientformer.V2_DOWNSAMPLE_DENSE,
)

# By the class name of the original.
_KNOWN = {
    "LiteMLA": _Known(lite_mla.LITE_MLA, ours.LiteMLA),
    "SanaMultiscaleLinearAttention": _Known(sana.MULTISCALE, sana.SanaMultiscaleLinearAttention),
    "CascadedGroupAttention": _Known(efficientvit_msra.CASCADE, ours.CascadedGroupAttention),
    "LocalWindowAttention": _Known(efficientvit_msra.WINDOWS, ours.LocalWindowAttention),
    "Attention": _Known(
        efficientformer.EFFICIENTFORMER,
        ours.EfficientFormerAttention,
        efficientformer.EFFICIENTFORMER_DENSE,
        common_name=True,
    ),
    "Attention2d": _V2,
    "Attention4D": _V2,
    "Attention2dDownsample": _V2_DOWNSAMPLE,
    "Attention4DDownsample": _V2_DOWNSAMPLE,
}

_REPLACEMENTS = {known.replacement for known in _KNOWN.values()} | {sana.SanaLinearAttnProcessor}


def _find(thing: Any, *, with_blocks: bool) -> tuple[type, str | None] | None:
    """What a module or a processor becomes, and why it cannot; None for those that nobody knows."""
    name = type(thing).__name__
    if name == "SanaLinearAttnProcessor2_0" and not isinstance(thing, nn.Module):
        return sana.SanaLinearAttnProcessor, why_not_this_class(thing) or sana.why_not_processor(thing)
    known = _KNOWN.get(name)
    if not isinstance(thing, nn.Module):
        return None
    if known is None:
        return _find_block(thing) if with_blocks else None
    original = known.original_of(thing)
    if known.common_name and original.missing(thing):
        return None
    if type(thing) is known.replacement:
        return known.replacement, "effattn's own"
    reason = why_not_this_class(thing) or original.why_not(thing)
    return known.replacement, reason or why_not_its_answers(thing, known.replacement, original)


def _find_block(module: nn.Module) -> tuple[type, str | None] | None:
    if not blocks.is_candidate(module):
        return None
    reason = why_not_this_class(module) or blocks.why_not_block(module)
    is_unknown = reason is not None and blocks.is_by_name_alone(module)
    return None if is_unknown else (block_class(type(module)), reason)


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        module: its name in the model.
        original: its original class, with the path.
        detail: the class that it has now, or why it was left alone.
    """

    module: str
    original: str
    detail: str


@dataclass
class Report:
    """What :func:`accelerate` did to the modules that it knows by name.

    Attributes:
        replaced: attention modules that have another class now.
        blocks: blocks around them whose inference on the CPU is one program now (:class:`effattn.nn.block.Block`), and
            the blocks inside of these, which go on where a block cannot.
        left_alone: those that it could not replace, or had replaced before.
    """

    replaced: list[Entry] = field(default_factory=list)
    blocks: list[Entry] = field(default_factory=list)
    left_alone: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.replaced and not self.blocks and not self.left_alone:
            return "effattn.accelerate: nothing in this model is known"
        blocks = f", {len(self.blocks)} blocks" if self.blocks else ""
        lines = [f"effattn.accelerate: {len(self.replaced)} replaced, {len(self.left_alone)} left alone{blocks}"]
        lines += [f"  {entry.module}: {entry.original} -> {entry.detail}" for entry in self.replaced]
        lines += [f"  {entry.module}: {entry.original} -> {detail}" for entry, detail in self._outermost_blocks()]
        lines += [f"  {entry.module}: {entry.original} left alone, {entry.detail}" for entry in self.left_alone]
        return "\n".join(lines)

    def _outermost_blocks(self) -> Iterator[tuple[Entry, str]]:
        outermost: dict[str, tuple[Entry, int]] = {}
        for entry in self.blocks:  # the outer ones come first
            outer = next((name for name in outermost if _is_inside(entry.module, name)), None)
            if outer is None:
                outermost[entry.module] = entry, 0
            else:
                outermost[outer] = outermost[outer][0], outermost[outer][1] + 1
        for entry, inside in outermost.values():
            yield entry, "one program" + (f", {inside} blocks inside of it" if inside else "")


#: The name of a model itself, in a report.
_MODEL = "(model)"


def _is_inside(name: str, outer: str | None) -> bool:
    return outer is not None and (outer == _MODEL or name.startswith(f"{outer}."))


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module by name, and what diffusers calls a processor: an object, no module, that does a module's work."""
    for name, module in model.named_modules():
        yield name or _MODEL, module
        processor = module.__dict__.get("processor")
        if processor is not None:
            yield f"{name}.processor".lstrip("."), processor


def accelerate(model: nn.Module) -> Report:
    """Replaces, in place, every module of ``model`` that effattn knows.

    Known are, of timm and of the official repositories, the attention of EfficientViT (MIT: ``LiteMLA``), EfficientViT
    (Microsoft: ``CascadedGroupAttention``, ``LocalWindowAttention``), EfficientFormer (``Attention``) and
    EfficientFormerV2 (``Attention2d``, ``Attention2dDownsample``; officially ``Attention4D``), which become modules of
    :mod:`effattn.nn`; and of diffusers the ``SanaMultiscaleLinearAttention`` of DC-AE and the
    ``SanaLinearAttnProcessor2_0`` of Sana's transformer. Snap's backbones for detection and segmentation are known too.
    Known are also the blocks around them, of timm's models and of EfficientViT's official ones: stems, stages and what
    they are made of. A block keeps its class, of which it gets a subclass: inference in float32 on the CPU is then one
    program (:class:`effattn.nn.block.Block`), everything else goes on as before.
    A module that has anything that the original has not, or code that computes something else, is left alone. Works in
    training and in evaluation, before or after loading weights. Hooks of a replaced module run as before. Its parts are
    not called any more, unless they are given hooks; a module whose parts have hooks already is left alone.
    :func:`restore` undoes it.

    Args:
        model: any module; it may itself be one of the known ones.

    Returns:
        A :class:`Report`; print it to see what happened.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    return _exchange(model, with_blocks=True)


def accelerate_attention(model: nn.Module) -> Report:
    """:func:`accelerate` without blocks: for exporters, whose engines have convolutions of their own."""
    return _exchange(model, with_blocks=False)


def _exchange(model: nn.Module, *, with_blocks: bool) -> Report:
    _check_model(model)
    report = Report()
    seen: set[int] = set()
    attention: str | None = None  # the last attention module, whose parts are its own business
    for name, module in _candidates(model):
        cls = type(module)
        if id(module) in seen:  # a processor of several modules
            continue
        seen.add(id(module))
        if isinstance(module, nn.Module) and _is_inside(name, attention) and type(module).__name__ not in _KNOWN:
            continue
        if ORIGINAL in module.__dict__:
            report.left_alone.append(Entry(name, _path(module.__dict__[ORIGINAL]), "accelerated already"))
            if not isinstance(module, Block) and isinstance(module, nn.Module):
                attention = name
            continue
        found = _find(module, with_blocks=with_blocks)
        if found is None:
            continue
        replacement, reason = found
        is_block = issubclass(replacement, Block)
        if not is_block and isinstance(module, nn.Module) and not _is_inside(name, attention):
            attention = name
        if reason is not None:
            report.left_alone.append(Entry(name, _path(cls), reason))
            continue
        module.__dict__[ORIGINAL] = cls
        module.__class__ = replacement
        if isinstance(module, Block):
            module.prepare_for_graphs()
        (report.blocks if is_block else report.replaced).append(Entry(name, _path(cls), _path(replacement)))
    return report


def restore(model: nn.Module) -> int:
    """Gives every module that :func:`accelerate` replaced its original class back.

    One whose class was changed since, by a parametrization of its table of biases, keeps it until that is removed.

    Returns:
        How many modules were restored.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    _check_model(model)
    count = 0
    for _, module in _candidates(model):
        original = module.__dict__.get(ORIGINAL)
        if original is not None and (type(module) in _REPLACEMENTS or isinstance(module, Block)):
            del module.__dict__[ORIGINAL]
            module.__dict__.pop(GRAPH, None)
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
