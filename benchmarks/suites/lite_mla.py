"""LiteMLA, inference and training, and the models that are made of it."""

from __future__ import annotations

from benchmarks.lite_mla import DCAEBlockCase, LiteMLACase
from benchmarks.modules import ModelCase, make_case
from benchmarks.runner import Case
from benchmarks.suites.base import TimedSuite

MODULES = (
    LiteMLACase("b1 stage 3 @224", 1, 128, 16, 14, 14),
    LiteMLACase("b1 stage 4 @224", 1, 256, 16, 7, 7),
    LiteMLACase("b1 stage 3 @1024x2048", 1, 128, 16, 64, 128),
    LiteMLACase("b1 stage 4 @1024x2048", 1, 256, 16, 32, 64),
    LiteMLACase("b3 stage 3 @512, batch 4", 4, 256, 32, 32, 32),
    LiteMLACase("l2 SAM stage 4 @1024", 1, 512, 32, 32, 32),
    DCAEBlockCase("DC-AE f32c32, last block @512", 1, 1024, 32, 16, 16),
)
MODULES_SHORT = ("b1 stage 3 @224", "b1 stage 4 @1024x2048")
TRAINING = (
    LiteMLACase("b1 stage 3 @224, batch 32", 32, 128, 16, 14, 14),
    LiteMLACase("b1 stage 3 @1024x2048", 1, 128, 16, 64, 128),
)
MODELS = (
    *(ModelCase(f"efficientvit_{name} @224", f"efficientvit_{name}", 1, 224, 224) for name in ("b0", "b1", "b2", "b3")),
    *(ModelCase(f"efficientvit_{name} @224", f"efficientvit_{name}", 1, 224, 224) for name in ("l1", "l2", "l3")),
    ModelCase("efficientvit_b1 @1024x2048", "efficientvit_b1", 1, 1024, 2048),
    ModelCase("efficientvit_l2 @1024", "efficientvit_l2", 1, 1024, 1024),
)


def _modules(short: bool) -> list[Case]:
    return [make_case(case) for case in MODULES if not short or case.name in MODULES_SHORT]


def _training(short: bool) -> list[Case]:
    return [] if short else [make_case(case, training=True) for case in TRAINING]


def _models(short: bool) -> list[Case]:
    return [] if short else [make_case(case) for case in MODELS]


LITE_MLA = TimedSuite("lite-mla", "LiteMLA, inference, float32", _modules)
LITE_MLA_TRAINING = TimedSuite("lite-mla-training", "LiteMLA, forward and backward, float32", _training)
EFFICIENTVIT = TimedSuite("efficientvit", "EfficientViT (MIT), whole models, inference, float32", _models)
