"""The attention of EfficientViT, forward and backward, in float32 and in the narrow types."""

from __future__ import annotations

import torch

from benchmarks import linear_attention as rla
from benchmarks.runner import Candidate, Case
from benchmarks.suites.base import TimedSuite

CASES = (
    rla.AttentionCase("b1 stage 3 @224, batch 32", 32, 16, 16, 14, 14),
    rla.AttentionCase("b1 stage 3 @512x1024", 1, 16, 16, 32, 64),
    rla.AttentionCase("b1 stage 3 @1024x2048", 1, 16, 16, 64, 128),
)
SHORT = ("b1 stage 3 @512x1024",)
NARROW = ("b1 stage 3 @224, batch 32", "b1 stage 3 @1024x2048")


def _candidates() -> tuple[Candidate, ...]:
    return (
        *rla.eager_candidates(),
        *rla.compiled_candidates("official"),
        *rla.effattn_candidates(),
        rla.check_candidate(),
    )


def _cases(short: bool) -> list[Case]:
    return [rla.make_case(case, _candidates(), training=True) for case in CASES if not short or case.name in SHORT]


def _narrow_cases(short: bool) -> list[Case]:
    return [
        rla.make_case(case, _candidates(), dtype, training=True)
        for case in CASES
        if case.name in NARROW and not short
        for dtype in (torch.bfloat16, torch.float16)
    ]


TRAINING = TimedSuite("training", f"{rla.NAME}, forward and backward, float32", _cases)
NARROW_TRAINING = TimedSuite(
    "narrow-training", f"{rla.NAME}, forward and backward, bfloat16 and float16", _narrow_cases
)
