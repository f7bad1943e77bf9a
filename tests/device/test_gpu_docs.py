"""docs/gpu.md: its code runs, and what it says of operators is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from effattn.backends import cuda, triton
from effattn.nn import LiteMLA
from effattn.ops import INFERENCE_OPERATORS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "gpu.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_operators_that_only_the_cpu_has():
    for name in re.findall(r"\(`lite_mla`, `(\w+)`, `(\w+)`\)", TEXT)[0]:
        assert name in INFERENCE_OPERATORS and name not in triton.LAUNCHERS and name not in cuda.OPERATORS


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
