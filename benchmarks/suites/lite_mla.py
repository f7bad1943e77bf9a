"""LiteMLA, inference and training, and the models that are made of it."""

from __future__ import annotations

from benchmarks.lite_mla import dc_ae_block, lite_mla
from benchmarks.modules import model_case
from benchmarks.suites.base import module_suite

MODULES = (
    lite_mla("b1 stage 3 @224", 1, 128, 16, 14, 14),
    lite_mla("b1 stage 4 @224", 1, 256, 16, 7, 7),
    lite_mla("b1 stage 3 @1024x2048", 1, 128, 16, 64, 128),
    lite_mla("b1 stage 4 @1024x2048", 1, 256, 16, 32, 64),
    lite_mla("b3 stage 3 @512, batch 4", 4, 256, 32, 32, 32),
    lite_mla("l2 SAM stage 4 @1024", 1, 512, 32, 32, 32),
    dc_ae_block("DC-AE f32c32, last block @512", 1, 1024, 32, 16, 16),
)
MODULES_SHORT = ("b1 stage 3 @224", "b1 stage 4 @1024x2048")
TRAINING = (
    lite_mla("b1 stage 3 @224, batch 32", 32, 128, 16, 14, 14),
    lite_mla("b1 stage 3 @1024x2048", 1, 128, 16, 64, 128),
)
MODELS = (
    *(
        model_case(f"efficientvit_{name} @224", f"efficientvit_{name}", 1, 224, 224)
        for name in ("b0", "b1", "b2", "b3", "l1", "l2", "l3")
    ),
    model_case("efficientvit_b1 @1024x2048", "efficientvit_b1", 1, 1024, 2048),
    model_case("efficientvit_l2 @1024", "efficientvit_l2", 1, 1024, 1024),
)

LITE_MLA = module_suite("lite-mla", "LiteMLA, inference, float32", MODULES, MODULES_SHORT)
LITE_MLA_TRAINING = module_suite("lite-mla-training", "LiteMLA, forward and backward, float32", TRAINING, training=True)
EFFICIENTVIT = module_suite("efficientvit", "EfficientViT (MIT), whole models, inference, float32", MODELS)
