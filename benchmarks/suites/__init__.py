"""The suites, in the order in which a full run takes them. Another operator, module or model adds its own."""

from __future__ import annotations

from benchmarks.suites.attention import ATTENTION, NARROW_TRAINING, NARROW_TYPES, TRAINING
from benchmarks.suites.base import Settings, TimedSuite
from benchmarks.suites.call import CALL
from benchmarks.suites.lite_mla import EFFICIENTVIT, LITE_MLA, LITE_MLA_TRAINING
from benchmarks.suites.processes import ALLOCATOR, MEMORY, ProcessSuite
from benchmarks.suites.rests import RESTED_CALLS, RESTS
from benchmarks.suites.scaling import SCALING
from benchmarks.suites.softmax_attention import SOFTMAX, SOFTMAX_MODELS, SOFTMAX_TRAINING

__all__ = ["SUITES", "Settings", "TimedSuite"]

SUITES: dict[str, TimedSuite | ProcessSuite] = {
    suite.name: suite
    for suite in (
        *(ATTENTION, NARROW_TYPES, TRAINING, NARROW_TRAINING),
        *(LITE_MLA, LITE_MLA_TRAINING, EFFICIENTVIT),
        *(SOFTMAX, SOFTMAX_TRAINING, SOFTMAX_MODELS),
        *(RESTED_CALLS, RESTS, SCALING, CALL),
        *(MEMORY, ALLOCATOR),
    )
}
