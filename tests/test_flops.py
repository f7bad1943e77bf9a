"""FLOPs as torch counts them of an accelerated model: those of the stock one."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from tiers import full
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import effattn
from effattn.testing import import_timm, make_image

timm = import_timm()


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


MODELS = ("efficientvit_b0", "efficientvit_m0", "efficientformer_l1", "efficientformerv2_s0")


@pytest.mark.parametrize("name", [MODELS[0], full(MODELS[1]), full(MODELS[2]), MODELS[3]])
def test_models(name):
    """timm multiplies queries with a column of ones' sum, and keys with the column itself, which nothing here does."""
    model = timm.create_model(name).eval()
    accelerated = copy.deepcopy(model)
    assert effattn.accelerate(accelerated).replaced
    x = make_image(2, 3, 224, 224)

    def step(model):
        out = model(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    for context in (torch.no_grad, torch.inference_mode):
        with context():
            counts = [flops(lambda m=m: m(x)) for m in (model, accelerated)]
        assert counts[1] == counts[0] if name != MODELS[0] else 0.999 * counts[0] < counts[1] < counts[0]
    for training in (False, True):
        counts = [flops(lambda m=m: step(m)) for m in (model.train(training), accelerated.train(training))]
        assert counts[1] == pytest.approx(counts[0], rel=1e-3)


def test_by_module_and_compiled():
    """Under the name of the module whose operator it is, and in compiled code."""
    model = timm.create_model("efficientvit_b0").eval()
    effattn.accelerate(model)
    x = make_image(1, 3, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False, depth=5) as counter:
        model(x)
    table = counter.get_flop_counts()
    attention = table["EfficientVit.stages.2.blocks.1.context_module.main"]
    assert [str(operator) for operator in attention] == ["effattn.lite_mla"]
    assert "effattn.lite_mla" in counter.get_table()
    block = model.stages[2].blocks[1].context_module
    compiled, features = torch.compile(block, backend="aot_eager"), make_image(1, 64, 5, 5)
    with torch.no_grad():
        compiled(features)
        assert flops(lambda: compiled(features)) == flops(lambda: block(features))


def test_every_operator_is_counted():
    counted = {str(packet) for packet in flop_registry}
    for name in torch._C._dispatch_get_all_op_names():
        namespace, operator = name.split("::")
        if namespace in ("effattn", "effattn_triton") and "." not in operator:
            assert f"{namespace}.{operator}" in counted


def test_nothing_is_loaded_before_somebody_counts():
    code = (
        "import sys, effattn, importlib.util\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "before = len(sys.meta_path)\n"
        "importlib.util.find_spec('torch.utils.flop_counter')\n"  # looks, and loads nothing
        "from torch.utils import flop_counter\n"
        "assert any('effattn' in str(packet) for packet in flop_counter.flop_registry)\n"
        "assert len(sys.meta_path) < before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
