"""Modules over the functions: state dicts of timm and of the official repositories load unchanged."""

from __future__ import annotations

from effattn.nn.cascaded_group_attention import CascadedGroupAttention, LocalWindowAttention
from effattn.nn.efficientformer import (
    EfficientFormerAttention,
    EfficientFormerV2Attention,
    EfficientFormerV2AttentionDownsample,
)
from effattn.nn.lite_mla import LiteMLA

__all__ = [
    "CascadedGroupAttention",
    "EfficientFormerAttention",
    "EfficientFormerV2Attention",
    "EfficientFormerV2AttentionDownsample",
    "LiteMLA",
    "LocalWindowAttention",
]
