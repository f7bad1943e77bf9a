"""Modules compiled ahead of time, in a process without effattn's Python: what C++ programs run."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from effattn import (
    biased_attention,
    cascaded_group_attention,
    multi_scale_aggregation,
    multi_scale_linear_attention,
    use_backend,
)
from effattn._library import library_path
from effattn.nn import CascadedGroupAttention, EfficientFormerAttention, EfficientFormerV2Attention, LiteMLA
from effattn.testing import FLOAT32_FORWARD_TOLERANCE, allowed_error, error, randomise_batch_norm

LOAD = (
    "import sys, torch\n"
    "torch.ops.load_library(sys.argv[1])\n"
    "model = torch._inductor.aoti_load_package(sys.argv[2])\n"
    "torch.save(model(*torch.load(sys.argv[3])), sys.argv[4])\n"
    "assert 'effattn' not in sys.modules\n"
)


class Functions(nn.Module):
    """Without whatever may be left out: biases, scales, talking heads."""

    def __init__(self) -> None:
        super().__init__()
        self.dw, self.pw = nn.Parameter(torch.randn(24, 1, 3, 3)), nn.Parameter(torch.randn(24, 8, 1, 1))
        self.qkv, self.q_dw = nn.Parameter(torch.randn(20, 12, 1, 1)), nn.Parameter(torch.randn(4, 1, 3, 3))
        self.bias = nn.Parameter(torch.randn(2, 30, 30))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = image.flatten(2).unflatten(1, (2, -1)).mT
        window = (5, 6)
        return (
            multi_scale_linear_attention(image, [self.dw], [self.pw], head_dim=8),
            multi_scale_aggregation(image, [], [], head_dim=8),
            biased_attention(heads, heads, heads, self.bias),
            cascaded_group_attention(
                image, [self.qkv, self.qkv], None, [self.q_dw, self.q_dw], None, self.bias, window_size=window
            ),
        )


class Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lite_mla = LiteMLA(32, 32, dim=8)
        self.cascade = CascadedGroupAttention(32, 8, num_heads=2, attn_ratio=2, resolution=7, kernels=(5, 3))
        self.first = EfficientFormerAttention(dim=32, key_dim=8, num_heads=2, attn_ratio=2, resolution=(7, 7))
        self.second = EfficientFormerV2Attention(dim=32, resolution=7, num_heads=2, key_dim=8)
        randomise_batch_norm(self)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = image.flatten(2).mT
        return self.lite_mla(image), self.cascade(image), self.first(tokens), self.second(image)


def check(tmp_path, module, image, operators):
    """Off from float64 by no more than plain formulations in float32 are."""
    module.eval()
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(image.double())
        with use_backend("reference"):
            plain = copy.deepcopy(module)(image)
        program = torch.export.export(module, (image,))
        called = {str(node.target).split(".")[1] for node in program.graph.nodes if "effattn." in str(node.target)}
        assert called == operators
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    case, results = tmp_path / "case.pt", tmp_path / "results.pt"
    torch.save((image,), case)
    subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, (library_path, package, case, results))], check=True, cwd=tmp_path
    )
    for got, baseline, expected in zip(torch.load(results), plain, truth, strict=True):
        assert error(got, expected) <= allowed_error(baseline, expected, FLOAT32_FORWARD_TOLERANCE)


@pytest.mark.full
def test_functions_without_what_may_be_left_out(tmp_path):
    operators = {
        "multi_scale_linear_attention",
        "multi_scale_aggregation",
        "biased_attention",
        "cascaded_group_attention",
    }
    check(tmp_path, Functions(), torch.randn(2, 24, 5, 6), operators)


def test_modules(tmp_path):
    operators = {"multi_scale_linear_attention", "cascaded_group_attention_projected", "projected_attention"}
    check(tmp_path, Modules(), torch.randn(2, 32, 7, 7), operators)


def test_a_list_that_is_left_out_is_an_empty_one():
    """As AOTInductor calls operators."""
    qkv, ops = torch.randn(1, 24, 5, 6), torch.ops.effattn
    dw, pw = [torch.randn(24, 1, 3, 3)], [torch.randn(24, 8, 1, 1)]
    assert torch.equal(
        ops.multi_scale_aggregation(qkv, dw, pw, None, None, 8), ops.multi_scale_aggregation(qkv, dw, pw, [], [], 8)
    )
    assert torch.equal(ops.multi_scale_aggregation(qkv, None, None, None, None, 8), qkv)
    q, bias = torch.randn(1, 2, 5, 4), torch.randn(2, 5, 5)
    assert torch.equal(ops.biased_attention(q, q, q, bias, None, 0.5), ops.biased_attention(q, q, q, bias, [], 0.5))
