"""The attention of EfficientViT alone, forward: float32 in the shapes of real models, and the narrow types."""

from __future__ import annotations

import torch

from benchmarks import linear_attention as rla
from benchmarks.linear_attention import Inputs
from benchmarks.runner import Candidate, Case, Role
from benchmarks.suites.base import TimedSuite

SHORT = ("b1 stage 3 @224", "b3 stage 3 @224, batch 16", "b1 stage 3 @1024x2048")
NARROW = ("b1 stage 3 @224", "b3 stage 3 @224, batch 16", "b1 stage 3 @1024x2048")
NARROW_SHORT = ("b1 stage 3 @1024x2048",)


def _attention_cases(short: bool) -> list[Case]:
    candidates = (
        *rla.eager_candidates(),
        *rla.compiled_candidates("official", "timm"),
        *rla.runtime_candidates(torch.float32),
        *rla.effattn_candidates(),
        rla.softmax_candidate(),
        rla.check_candidate(),
    )
    return [rla.make_case(case, candidates) for case in rla.ATTENTION_CASES if not short or case.name in SHORT]


def _narrow_cases(short: bool) -> list[Case]:
    return [
        rla.make_case(
            case,
            (
                *rla.eager_candidates(),
                *rla.compiled_candidates("official", "timm"),
                *rla.runtime_candidates(dtype),
                *rla.effattn_candidates(),
                _effattn_float32(),
                rla.check_candidate(),
            ),
            dtype,
        )
        for case in rla.ATTENTION_CASES
        if case.name in (NARROW_SHORT if short else NARROW)
        for dtype in ((torch.bfloat16,) if short else (torch.bfloat16, torch.float16))
    ]


def _effattn_float32() -> Candidate:
    """The same case in float32: what a narrow type gains."""
    ours = rla.effattn_candidates()[0]

    def widened(data: Inputs) -> Inputs:
        return Inputs(data.case, torch.float32)

    return Candidate(
        f"{rla.OURS} in float32",
        ours.variant,
        Role.CONTEXT,
        lambda data: ours.build(widened(data)),
        lambda data, result: ours.check(widened(data), result),
    )


ATTENTION = TimedSuite("attention", f"{rla.NAME}, forward, float32", _attention_cases)
NARROW_TYPES = TimedSuite("narrow", f"{rla.NAME}, forward, bfloat16 and float16", _narrow_cases)
