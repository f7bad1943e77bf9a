"""Models for torch.export and AOTInductor: blocks as operators with constant weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

import effattn
from effattn.nn.block import Block
from effattn.nn.programs import EMITTERS, Unknown, make_program
from effattn.ops import block as _block


class FrozenBlock(nn.Module):
    """A program and its weights, in place of a block.

    Args:
        block: what it computes.
        returns_tokens: whether (B, N, C) in place of an image.
    """

    weights: torch.Tensor

    def __init__(self, block: _block.Block, *, returns_tokens: bool) -> None:
        super().__init__()
        self.register_buffer("weights", block.weights)
        self.program, self.returns_tokens = block.program, returns_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C_out, H', W'), of x's memory format."""
        out = _block.block(x, _block.Block(self.weights, self.program))
        return out.flatten(2).transpose(1, 2) if self.returns_tokens else out


@torch.no_grad()
def freeze(model: nn.Module) -> nn.Module:
    """A copy of a model for ``torch.export`` and AOTInductor, in evaluation, whose blocks are one operator each.

    The model stays as it is, accelerated or not. Of the copy, the outermost blocks that effattn knows
    (:func:`effattn.accelerate`) are modules with nothing but packed weights: numbers of the moment, which no longer
    follow the model's. They take float32 images on the CPU.

    Args:
        model: any module; its forward must call its blocks, not their parts.

    Returns:
        The copy.

    Raises:
        TypeError: if ``model`` is not a module.
        RuntimeError: if it has no block that effattn knows.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    frozen = nn.ModuleDict({"model": copy.deepcopy(model)})
    frozen.eval()  # of some of timm's modules it returns nothing
    report = effattn.accelerate(frozen)
    if _freeze_children(frozen) == 0:
        raise RuntimeError(f"freeze: expected a model with blocks that effattn knows; {report}")
    return frozen["model"]


def _freeze_children(module: nn.Module) -> int:
    """In place; returns how many became operators."""
    count = 0
    for name, part in list(module._modules.items()):
        if part is None:
            continue
        try:
            if not isinstance(part, Block):
                raise Unknown("it is no block")
            block, returns_tokens = make_program(part, EMITTERS)
            module._modules[name] = FrozenBlock(block, returns_tokens=returns_tokens)
            count += 1
        except Unknown:
            count += _freeze_children(part)
    return count
