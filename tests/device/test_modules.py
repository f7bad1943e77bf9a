"""Modules on the kernels of GPUs: in training, with BatchNorm between the parts, and in evaluation."""

from __future__ import annotations

import pytest
import torch
from specified import check_gradients, module_results

from effattn.nn import EfficientFormerV2Attention, LiteMLA, LocalWindowAttention

pytestmark = pytest.mark.each_value

MODULES = {
    "LiteMLA": (lambda: LiteMLA(16, 16, dim=8, scales=(3,)), (6, 7)),
    "LocalWindowAttention": (
        lambda: LocalWindowAttention(
            16, 4, num_heads=2, attn_ratio=2, resolution=6, window_resolution=3, kernels=(3, 5)
        ),
        (6, 6),
    ),
    "EfficientFormerV2Attention": (
        lambda: EfficientFormerV2Attention(dim=16, resolution=6, num_heads=2, key_dim=4),
        (6, 6),
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients_of_parameters(device, backend, name, training):
    make, size = MODULES[name]
    torch.manual_seed(0)
    module = make().to(device).train(training)
    x, grad_out = torch.randn(2, 2, 16, *size, device=device)
    check_gradients(module_results(module, x, grad_out), module, x, grad_out)
