"""Cascaded group attention and EfficientFormer's attention, inference and training, and the models made of them."""

from __future__ import annotations

from benchmarks.modules import model_case
from benchmarks.softmax_attention import cascade, efficientformer, efficientformer_v2
from benchmarks.suites.base import module_suite

_M4_KERNELS, _M5_KERNELS = (7, 5, 3, 3), (7, 5, 3)
MODULES = (
    cascade("CGA m4 stage 1, 4 windows", 1, 128, 14, _M4_KERNELS),
    cascade("CGA m4 stage 2, 7x7", 1, 256, 7, _M4_KERNELS),
    cascade("CGA m4 stage 3, 4x4", 1, 384, 4, _M4_KERNELS),
    cascade("CGA m5 stage 1 @896, 64 windows", 1, 192, 56, _M5_KERNELS),
    efficientformer("EfficientFormer-L1, batch 1", 1, 448),
    efficientformer("EfficientFormer-L1, batch 16", 16, 448),
    efficientformer_v2("EfficientFormerV2-S1 stage 4", 1, 224, 7),
    efficientformer_v2("EfficientFormerV2-S1 stage 3, stride 2", 1, 120, 14, stride=2),
    efficientformer_v2("EfficientFormerV2-S1, downsampling", 1, 120, 14, out_channels=224),
)
MODULES_SHORT = ("CGA m4 stage 2, 7x7", "EfficientFormer-L1, batch 1")
TRAINING = (
    cascade("CGA m4 stage 1, batch 32", 32, 128, 14, _M4_KERNELS),
    efficientformer("EfficientFormer-L1, batch 32", 32, 448),
)
MODELS = tuple(
    model_case(f"{model} @224" + (f", batch {batch}" if batch > 1 else ""), model, batch, 224, 224)
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

SOFTMAX = module_suite(
    "softmax", "Cascaded group attention and EfficientFormer's attention, inference, float32", MODULES, MODULES_SHORT
)
SOFTMAX_TRAINING = module_suite("softmax-training", "The same, forward and backward, float32", TRAINING, training=True)
SOFTMAX_MODELS = module_suite(
    "softmax-models", "EfficientViT (Microsoft) and EfficientFormer, whole models, inference, float32", MODELS
)
