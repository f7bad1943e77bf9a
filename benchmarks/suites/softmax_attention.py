"""Cascaded group attention and EfficientFormer's attention, inference and training, and the models made of them."""

from __future__ import annotations

from benchmarks.modules import ModelCase, make_case
from benchmarks.runner import Case
from benchmarks.softmax_attention import AnyModule, CascadeModule, EfficientFormerModule, EfficientFormerV2Module
from benchmarks.suites.base import TimedSuite

_M4_KERNELS, _M5_KERNELS = (7, 5, 3, 3), (7, 5, 3)
MODULES: tuple[AnyModule, ...] = (
    CascadeModule("CGA m4 stage 1, 4 windows", 1, 128, 14, _M4_KERNELS),
    CascadeModule("CGA m4 stage 2, 7x7", 1, 256, 7, _M4_KERNELS),
    CascadeModule("CGA m4 stage 3, 4x4", 1, 384, 4, _M4_KERNELS),
    CascadeModule("CGA m5 stage 1 @896, 64 windows", 1, 192, 56, _M5_KERNELS),
    EfficientFormerModule("EfficientFormer-L1, batch 1", 1, 448),
    EfficientFormerModule("EfficientFormer-L1, batch 16", 16, 448),
    EfficientFormerV2Module("EfficientFormerV2-S1 stage 4", 1, 224, 7),
    EfficientFormerV2Module("EfficientFormerV2-S1 stage 3, stride 2", 1, 120, 14, stride=2),
    EfficientFormerV2Module("EfficientFormerV2-S1, downsampling", 1, 120, 14, out_channels=224),
)
MODULES_SHORT = ("CGA m4 stage 2, 7x7", "EfficientFormer-L1, batch 1")
TRAINING = (
    CascadeModule("CGA m4 stage 1, batch 32", 32, 128, 14, _M4_KERNELS),
    EfficientFormerModule("EfficientFormer-L1, batch 32", 32, 448),
)
MODELS = tuple(
    ModelCase(f"{model} @224" + (f", batch {batch}" if batch > 1 else ""), model, batch, 224, 224)
    for model in (
        "efficientvit_m0",
        "efficientvit_m4",
        "efficientvit_m5",
        "efficientformer_l1",
        "efficientformer_l3",
        "efficientformerv2_s1",
    )
    for batch in (1, 16)
)


def _modules(short: bool) -> list[Case]:
    return [make_case(case) for case in MODULES if not short or case.name in MODULES_SHORT]


def _training(short: bool) -> list[Case]:
    return [] if short else [make_case(case, training=True) for case in TRAINING]


def _models(short: bool) -> list[Case]:
    return [] if short else [make_case(case) for case in MODELS]


SOFTMAX = TimedSuite(
    "softmax", "Cascaded group attention and EfficientFormer's attention, inference, float32", _modules
)
SOFTMAX_TRAINING = TimedSuite("softmax-training", "The same, forward and backward, float32", _training)
SOFTMAX_MODELS = TimedSuite(
    "softmax-models", "EfficientViT (Microsoft) and EfficientFormer, whole models, inference, float32", _models
)
