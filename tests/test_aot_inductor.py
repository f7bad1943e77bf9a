"""Modules compiled ahead of time, in a process without effattn's Python: what C++ programs run."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from specified import AsModule
from torch import nn

from effattn._library import library_path
from effattn.nn import CascadedGroupAttention, EfficientFormerAttention, EfficientFormerV2Attention, LiteMLA
from effattn.ops import OPERATORS
from effattn.testing import make_arguments, randomise_batch_norm
from effattn.tolerance import check_against

LOAD = (
    "import sys, torch\n"
    "torch.ops.load_library(sys.argv[1])\n"
    "model = torch._inductor.aoti_load_package(sys.argv[2])\n"
    "torch.save(model(*torch.load(sys.argv[3])), sys.argv[4])\n"
    "assert 'effattn' not in sys.modules\n"
)
#: torch's own kernels are no matter here: what the compiler can need not be found out, which takes as long as the rest.
QUICKLY_COMPILED = {"cpp.vec_isa_ok": False, "aot_inductor.precompile_headers": False}


class Operators(nn.Module):
    """Every operator, without whatever may be left out: biases, scales, talking heads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.images = nn.ModuleList(), nn.ParameterList()
        for operator in OPERATORS.values():
            optional = [a.name for a in operator.signature.arguments if a.may_be_empty]
            arguments = make_arguments(operator, {**operator.cases[0], "without": optional})
            self.calls.append(AsModule(operator, arguments))
            self.images.append(nn.ParameterList(arguments[: operator.signature.num_activations]))

    def forward(self, times: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pairs = zip(self.calls, self.images, strict=True)
        return tuple(call(*(image * times for image in images)) for call, images in pairs)


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


def check(tmp_path, module, given, operators, longest_sum):
    """Against float64; ``operators``: how many of ours the graph calls."""
    module.eval()
    wide = copy.deepcopy(module).double()

    def compute():
        with torch.no_grad():
            return dict(enumerate(wide(given.double())))

    with torch.no_grad():
        program = torch.export.export(module, (given,))
        called = {str(node.target).split(".")[1] for node in program.graph.nodes if "effattn." in str(node.target)}
        assert len(called) == operators
        with torch._inductor.config.patch(QUICKLY_COMPILED):
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    case, results = tmp_path / "case.pt", tmp_path / "results.pt"
    torch.save((given,), case)
    subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, (library_path, package, case, results))], check=True, cwd=tmp_path
    )
    check_against(compute, dict(enumerate(torch.load(results))), longest_sum)


@pytest.mark.full
def test_operators_without_what_may_be_left_out(tmp_path):
    check(tmp_path, Operators(), torch.ones(()), len(OPERATORS), 64)


def test_modules(tmp_path):
    check(tmp_path, Modules(), torch.randn(2, 32, 7, 7), 3, 64)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_list_that_is_left_out_is_an_empty_one(name):
    """As AOTInductor calls operators."""
    operator = OPERATORS[name]
    optional = [i for i, a in enumerate(operator.signature.arguments) if a.may_be_empty]
    without = {"without": [operator.signature.arguments[i].name for i in optional]}
    empty = make_arguments(operator, operator.cases[0] | without)
    none = [None if i in optional else a for i, a in enumerate(empty)]
    call = getattr(torch.ops.effattn, f"{name}_forward")
    first, second = (torch.utils._pytree.tree_leaves(call(*arguments)) for arguments in (empty, none))
    assert all(map(torch.equal, first, second))
