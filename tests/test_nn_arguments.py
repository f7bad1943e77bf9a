"""What effattn.nn's modules say of an input that they cannot take."""

from __future__ import annotations

import pytest
import torch

from effattn import nn

MODULES = {
    "LiteMLA": (lambda: nn.LiteMLA(32, 40, dim=16), 32),
    "CascadedGroupAttention": (lambda: nn.CascadedGroupAttention(64, 16, 4, 1, resolution=7), 64),
    "LocalWindowAttention": (lambda: nn.LocalWindowAttention(64, 16, 4, 1, window_resolution=4), 64),
    "EfficientFormerV2Attention": (lambda: nn.EfficientFormerV2Attention(64, 16, 4), 64),
    "EfficientFormerV2AttentionDownsample": (
        lambda: nn.EfficientFormerV2AttentionDownsample(64, 16, 4, out_dim=96, resolution=14),
        64,
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("batch", [(), (1, 1)], ids=["three dimensions", "five"])
@pytest.mark.parametrize("name", MODULES)
def test_an_image_has_four_dimensions(name, batch, grad):
    make, channels = MODULES[name]
    x = torch.randn(*batch, channels, 7, 7)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"^x: expected shape \(B, C, H, W\), got \("):
        make().train(grad)(x)


@pytest.mark.parametrize("channels", [8, 0, 128])
@pytest.mark.parametrize("name", MODULES)
def test_channels_in_evaluation(name, channels):
    make, own = MODULES[name]
    x = torch.randn(1, channels, 7, 7)
    message = rf"^x: expected shape \(B, {own}, H, W\), got \(1, {channels}, 7, 7\)"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        make().eval()(x)


@pytest.mark.parametrize("name", ["CascadedGroupAttention", "LocalWindowAttention"])
def test_channels_in_training(name):
    """Where weights go into one operator; elsewhere torch's convolution says what it expects."""
    make, own = MODULES[name]
    with pytest.raises(ValueError, match=rf"^x: expected shape \(B, {own}, H, W\), got \(1, 128,"):
        make().train()(torch.randn(1, 128, 8, 8))


@pytest.mark.parametrize("shape", [(49, 64), (1, 1, 49, 64)], ids=str)
def test_tokens_have_three_dimensions(shape):
    with pytest.raises(ValueError, match=r"^x: expected shape \(B, tokens, C\), got \("):
        nn.EfficientFormerAttention(64, 16, 4)(torch.randn(shape))


def test_channels_of_tokens():
    with torch.no_grad(), pytest.raises(ValueError, match=r"^x: expected shape \(B, tokens, 64\), got \(1, 49, 32\)"):
        nn.EfficientFormerAttention(64, 16, 4).eval()(torch.randn(1, 49, 32))


def test_no_tokens():
    with pytest.raises(ValueError, match=r"^x: expected a square number of tokens, got shape \(B, 0, C\)"):
        nn.EfficientFormerAttention(64, 16, 4)(torch.randn(2, 0, 64))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", MODULES)
def test_integers(name, grad):
    make, channels = MODULES[name]
    x = torch.ones(1, channels, 7, 7, dtype=torch.int64)
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=r"^x: expected a floating-point tensor, got"):
        make().train(grad)(x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(0, 7), (7, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", ["LiteMLA", "CascadedGroupAttention", "LocalWindowAttention"])
def test_an_empty_image(name, size, training):
    make, channels = MODULES[name]
    x = torch.randn(2, channels, *size, requires_grad=training)
    with torch.set_grad_enabled(training):
        out = make().train(training)(x)
    assert out.shape == (2, out.shape[1], *size)
