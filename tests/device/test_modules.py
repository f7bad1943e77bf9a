"""Modules on the kernels of cards: in training, with BatchNorm between the parts, and in evaluation."""

from __future__ import annotations

import pytest
import torch

from effattn import use_backend
from effattn.nn import EfficientFormerV2Attention, LiteMLA, LocalWindowAttention
from effattn.testing import FLOAT32_GRADIENT_TOLERANCE, error

pytestmark = pytest.mark.each_value

#: Of the largest gradient: a bias in front of a BatchNorm has no gradient but rounding noise.
NOISE = 1e-6
MODULES = {
    "LiteMLA": (lambda: LiteMLA(16, 16, dim=8, scales=(3,)), (6, 7), 0.0),
    "LocalWindowAttention": (
        lambda: LocalWindowAttention(
            16, 4, num_heads=2, attn_ratio=2, resolution=6, window_resolution=3, kernels=(3, 5)
        ),
        (6, 6),
        NOISE,
    ),
    "EfficientFormerV2Attention": (
        lambda: EfficientFormerV2Attention(dim=16, resolution=6, num_heads=2, key_dim=4),
        (6, 6),
        NOISE,
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients_of_parameters(device, backend, name, training):
    make, size, noise = MODULES[name]
    torch.manual_seed(0)
    module = make().to(device).train(training)
    x, grad_out = torch.randn(2, 1, 16, *size, device=device)
    got, expected = [], []
    for by, results in ((backend, got), ("reference", expected)):
        with use_backend(by):
            out = module(x)
            results += [out, *torch.autograd.grad(out, [*module.parameters()], grad_out)]
    scale = max(b.norm().item() for b in expected[1:])
    for a, b in zip(got, expected, strict=True):
        assert error(a, b.double()) <= FLOAT32_GRADIENT_TOLERANCE * b.norm().item() + noise * scale
