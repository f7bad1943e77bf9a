"""relu_linear_attention, forward and backward."""

from __future__ import annotations

from benchmarks import relu_linear_attention as rla
from benchmarks.runner import Case
from benchmarks.suites.base import TimedSuite
from effattn.testing import AttentionCase

CASES = (
    AttentionCase("b1 stage 3 @224, batch 32", 32, 16, 16, 14, 14),
    AttentionCase("b1 stage 3 @512x1024", 1, 16, 16, 32, 64),
    AttentionCase("b1 stage 3 @1024x2048", 1, 16, 16, 64, 128),
)
SHORT = ("b1 stage 3 @512x1024",)


def _cases(short: bool) -> list[Case]:
    candidates = (
        *rla.eager_candidates(),
        *rla.compiled_candidates("official"),
        *rla.effattn_candidates(),
        rla.check_candidate(),
    )
    return [rla.make_case(case, candidates, training=True) for case in CASES if not short or case.name in SHORT]


TRAINING = TimedSuite("training", "relu_linear_attention, forward and backward, float32", _cases)
