"""docs/gpu.md: its code runs, and what it says of operators is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from effattn import _library
from effattn.backends import Fused, cuda, triton
from effattn.backends._sizes import SIZES
from effattn.nn import LiteMLA

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "gpu.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_every_operator_has_a_forward_and_a_backward():
    for op in SIZES:
        assert isinstance(triton.BACKEND.functions[op], Fused)
        assert _library.cuda_error is not None or isinstance(cuda.BACKEND.functions[op], Fused)


def test_operators_that_only_the_cpu_has():
    for name in re.findall(r"\(`lite_mla`, `(\w+)`, `(\w+)`\)", TEXT)[0]:
        assert name not in triton.BACKEND.functions and name not in cuda.BACKEND.functions


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code(block, device, backend, capsys):
    model = torch.nn.Sequential(LiteMLA(16, 16, dim=8)).eval().to(device)
    names = {"device": device, "model": model, "image": torch.randn(2, 16, 6, 7, device=device)}
    exec(block, names)
    if "captured" in names and device.type == "cuda":
        with torch.no_grad():
            expected = model(names["image"])
        graph, out = names["captured"](model, names["image"])
        graph.replay()
        assert torch.equal(out, expected)
    if "largest_difference" in names:
        assert f"'{backend}': " in capsys.readouterr().out
