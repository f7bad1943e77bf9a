"""Which blocks become programs (:mod:`effattn.nn.programs`)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from effattn.integrations.structure import is_same, randomize
from effattn.nn.origin import original_class, tried
from effattn.nn.programs import EMITTERS, OF_TOKENS, Unknown, is_trusted, make_program
from effattn.ops import _program
from effattn.ops import block as _block


def is_candidate(module: nn.Module) -> bool:
    """Whether a module has the name of a known block, or is a row of such."""
    cls = original_class(module)
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if cls.forward is nn.Sequential.forward:
        return (cls is not nn.Sequential and is_trusted(cls)) or any(map(is_candidate, module.children()))
    return cls.__name__ in EMITTERS and cls.__name__ not in OF_TOKENS


def is_by_name_alone(module: nn.Module) -> bool:
    """Whether nobody would call a candidate that is no program a known block: others have its name too."""
    cls = original_class(module)
    return cls.forward is nn.Sequential.forward or not is_trusted(cls)


def why_not_block(module: nn.Module) -> str | None:
    """Why a candidate is no program; None if it is one."""
    unknown = {cls for cls in map(original_class, module.modules()) if cls.__name__ in EMITTERS and not is_trusted(cls)}
    tried.update(unknown)
    try:
        make_program(module, EMITTERS, shapes_only=True)
        reason = why_not_its_answers(module) if unknown else None
    except Unknown as error:
        reason = str(error)
    if reason is not None:
        tried.difference_update(unknown)
    return reason


def why_not_its_answers(module: nn.Module) -> str | None:
    """Where classes that no library has compute something else: a copy with random weights is asked for one image."""
    tensors = [*module.parameters(), *module.buffers()]
    if not all(type(t) in (nn.Parameter, torch.Tensor) and not t.is_meta for t in tensors):
        return "its classes are nobody's library, and weights of this kind cannot be tried"
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            narrow = copy.deepcopy(module).to("cpu", torch.float32).eval()
            generator = randomize(narrow)
            block, returns_tokens = make_program(narrow, EMITTERS)
            wide = narrow.double()
            channels = _program.parse(block.program)[0].channels
            x = torch.rand(2, channels, 13, 10, dtype=torch.float64, generator=generator)
            theirs = original_class(wide).forward(wide, x)
            ours = _block.plain(x, [block.weights], block.program)
            same = is_same(ours.flatten(2).transpose(1, 2) if returns_tokens else ours, theirs)
    except Unknown as error:
        return str(error)
    except Exception as error:
        return f"its forward could not be tried ({type(error).__name__}: {error})"
    return None if same else "its forward computes something else"
