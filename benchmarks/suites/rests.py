"""What comes before a call: what the rests of the protocol are for, and the first call after a pause."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import linear_attention as rla
from benchmarks.linear_attention import LAYOUTS
from benchmarks.modules import NO_FLOOR
from benchmarks.runner import FORMER, RESTED, STEADY, Accuracy, Call, Candidate, Case, Protocol, Role
from benchmarks.suites.attention import ATTENTION
from benchmarks.suites.base import TimedSuite
from benchmarks.suites.lite_mla import EFFICIENTVIT, LITE_MLA
from benchmarks.suites.softmax_attention import SOFTMAX, SOFTMAX_MODELS

#: A call that is over within a tick of the scheduler, and one that onnxruntime's spinning threads outlast.
DISTURBED = ("b1 stage 3 @224", "l2 SAM stage 4 @1024")
#: What a call takes in a loop that goes on for long: what both protocols should find, whatever came before.
LOOP = Protocol("loop", rest=0.0, warm_up=0.2, timed=1e-3)
#: Just short of what the engine would give fewer rounds.
PAUSE_SECONDS = 0.09


def _pause(_: Any) -> Call:
    return partial(time.sleep, PAUSE_SECONDS)


def _no_gate(_: Any, result: Any) -> Accuracy:
    return Accuracy(0.0, 0.0)


def _disturbers() -> list[Candidate]:
    onnxruntime = rla.runtime_candidates(torch.float32)[0]
    return [
        replace(onnxruntime, role=Role.CONTEXT),
        Candidate("a pause", LAYOUTS[0], Role.CONTEXT, _pause, _no_gate),
    ]


def _rests_cases(short: bool) -> list[Case]:
    """The stock formulation twice in a round: after itself, and after what disturbs it."""
    stock = rla.eager_candidates()[0]
    if short:
        return []
    return [
        replace(
            rla.make_case(case, (stock, disturber, rla.check_candidate())),
            name=f"{case.name}, after {disturber.name}, {protocol.name} protocol",
            protocol=protocol,
        )
        for case in rla.ATTENTION_CASES
        if case.name in DISTURBED
        for disturber in _disturbers()
        for protocol in (FORMER, STEADY, LOOP)
    ]


def _rested_cases(short: bool) -> list[Case]:
    """Cases of other suites, with all of their candidates; of a first call there is no floor."""
    if short:
        return []
    return [
        replace(case, name=f"{suite.name}: {case.name}", protocol=RESTED, work=NO_FLOOR)
        for suite in (ATTENTION, LITE_MLA, SOFTMAX, SOFTMAX_MODELS, EFFICIENTVIT)
        for case in suite.cases(False)
        if (suite.name, case.name) in REPRESENTATIVE
    ]


REPRESENTATIVE = (
    ("attention", "b1 stage 3 @224"),
    ("attention", "b1 stage 3 @1024x2048"),
    ("lite-mla", "b1 stage 3 @224"),
    ("softmax", "CGA m4 stage 1, 4 windows"),
    ("softmax", "CGA m4 stage 2, 7x7"),
    ("softmax", "CGA m4 stage 3, 4x4"),
    ("softmax", "EfficientFormer-L1, batch 1"),
    ("softmax-models", "efficientvit_m0 @224"),
    ("efficientvit", "efficientvit_b1 @224"),
)

RESTS = TimedSuite("rests", "the stock formulation twice: after itself and after what disturbs it", _rests_cases)
RESTED_CALLS = TimedSuite(
    "rested",
    f"the first call after {RESTED.rest * 1e3:.0f} ms of rest, inference, float32",
    _rested_cases,
    rounds_factor=2,  # a sample is one call, as the scheduler and the clock speed happen to find it
)
