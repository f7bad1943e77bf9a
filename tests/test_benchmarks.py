"""What the benchmarks rely on and would not notice if it failed."""

from __future__ import annotations

import torch

from benchmarks import peers


def test_compiled_modules_are_frozen():
    """Peers get their best setting: a frozen weight is a constant that no change reaches."""
    linear, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with torch.no_grad():
        expected = linear(x)
        module = peers.compiled_module(linear, x)
        linear.weight.add_(1.0)
        assert torch.allclose(module(x), expected)


def test_compiled_modules_train():
    linear, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    module = peers.compiled_module(linear, x)
    module(x).sum().backward()
    assert linear.weight.grad is not None
