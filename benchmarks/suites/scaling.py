"""Time over the number of tokens, as in figure 4 of the EfficientViT paper (arXiv 2205.14756)."""

from __future__ import annotations

import time
from dataclasses import replace

from benchmarks import linear_attention as rla
from benchmarks.linear_attention import Inputs
from benchmarks.runner import Call, Case
from benchmarks.suites.base import TimedSuite

HEADS, HEAD_DIM = 16, 16
SIDES = ((7, 7), (14, 14), (32, 32), (64, 64), (128, 128), (256, 256))
SHORT_SIDES = ((7, 7), (32, 32), (128, 128))
#: Softmax attention is quadratic: it is left out where one call would take longer than this.
LIMIT_SECONDS = 2.0


def _softmax_call(data: Inputs) -> Call:
    """Softmax attention, unless a call on an eighth of the tokens says that it would take too long."""
    case = data.case
    call = rla.softmax_call(Inputs(replace(case, width=max(case.width // 8, 1)), data.dtype))
    call()
    start = time.perf_counter()
    call()
    seconds = 64 * (time.perf_counter() - start)
    if case.tokens > 4096 and seconds > LIMIT_SECONDS:
        raise TimeoutError(f"one call would take about {seconds:.0f} s")
    return rla.softmax_call(data)


def _cases(short: bool) -> list[Case]:
    linear = (*rla.eager_candidates(), *rla.compiled_candidates("official"), *rla.effattn_candidates())
    candidates = (
        *(c for c in linear if c.variant == rla.LAYOUTS[0] and not c.name.startswith("timm")),
        rla.softmax_candidate(_softmax_call),
        rla.check_candidate(),
    )
    return [
        rla.make_case(rla.AttentionCase(f"{h * w} tokens", 1, HEADS, HEAD_DIM, h, w), candidates)
        for h, w in (SHORT_SIDES if short else SIDES)
    ]


SCALING = TimedSuite("scaling", f"forward over the number of tokens, {HEADS} heads of {HEAD_DIM}, float32", _cases)
