"""squared_relu, compiled for GPUs that need not be there: nothing is spilled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from no_gpu import FORMATS, names_of, on_every_target, options_for


@pytest.mark.parametrize(("memory_format", "dtype"), [("nchw", torch.float32), ("channels_last", torch.bfloat16)])
@on_every_target
def test_nothing_is_spilled(compiled, target, memory_format, dtype):
    from effattn._triton import squared_relu

    x = torch.empty(2, 128, 14, 14, dtype=dtype).to(memory_format=FORMATS[memory_format])
    weight, options = torch.empty(128), options_for(target)
    squared_relu.forward((torch.empty_like(x),), x, weight, 1.0, options)
    squared_relu.backward((torch.empty_like(x), weight), x, x, weight, 1.0, options)
    assert names_of(compiled) == ["_forward", "_backward", "_add_up"]
