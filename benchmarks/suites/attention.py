"""The attention of EfficientViT alone, forward and with its backward: shapes of real models, and narrow types."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from benchmarks import linear_attention as rla
from benchmarks.linear_attention import AttentionCase, Inputs
from benchmarks.runner import Candidate, Case, Role
from benchmarks.suites.base import TimedSuite

SHORT = ("b1 stage 3 @224", "b3 stage 3 @224, batch 16", "b1 stage 3 @1024x2048")
NARROW = (torch.bfloat16, torch.float16)
TRAINING_CASES = (
    AttentionCase("b1 stage 3 @224, batch 32", 32, 16, 16, 14, 14),
    AttentionCase("b1 stage 3 @512x1024", 1, 16, 16, 32, 64),
    AttentionCase("b1 stage 3 @1024x2048", 1, 16, 16, 64, 128),
)
TRAINING_SHORT = ("b1 stage 3 @512x1024",)
TRAINING_NARROW = ("b1 stage 3 @224, batch 32", "b1 stage 3 @1024x2048")


def _forward(dtype: torch.dtype) -> list[Candidate]:
    return [
        *rla.eager_candidates(),
        *rla.compiled_candidates("official", "timm"),
        *rla.runtime_candidates(dtype),
        *rla.effattn_candidates(),
        rla.softmax_candidate() if dtype == torch.float32 else _effattn_float32(),
        rla.check_candidate(),
    ]


def _training(_: torch.dtype) -> list[Candidate]:
    return [
        *rla.eager_candidates(),
        *rla.compiled_candidates("official"),
        *rla.effattn_candidates(),
        rla.check_candidate(),
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


def _cases(
    cases: Iterable[AttentionCase],
    names: Collection[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    candidates: Callable[[torch.dtype], list[Candidate]] = _forward,
) -> list[Case]:
    """Those of these names, or all."""
    chosen = [case for case in cases if names is None or case.name in names]
    training = candidates is _training
    return [rla.make_case(case, candidates(dtype), dtype, training) for case in chosen for dtype in dtypes]


ATTENTION = TimedSuite(
    "attention",
    f"{rla.NAME}, forward, float32",
    lambda short: _cases(rla.ATTENTION_CASES, SHORT if short else None),
)
NARROW_TYPES = TimedSuite(
    "narrow",
    f"{rla.NAME}, forward, bfloat16 and float16",
    lambda short: _cases(rla.ATTENTION_CASES, SHORT[-1:] if short else SHORT, NARROW[:1] if short else NARROW),
)
TRAINING = TimedSuite(
    "training",
    f"{rla.NAME}, forward and backward, float32",
    lambda short: _cases(TRAINING_CASES, TRAINING_SHORT if short else None, candidates=_training),
)
NARROW_TRAINING = TimedSuite(
    "narrow-training",
    f"{rla.NAME}, forward and backward, bfloat16 and float16",
    lambda short: _cases(TRAINING_CASES, () if short else TRAINING_NARROW, NARROW, _training),
)
