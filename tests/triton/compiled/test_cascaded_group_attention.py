"""cascaded_group_attention, compiled for GPUs that need not be there: nothing is spilled, and what its loop takes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from no_gpu import FORMATS, kernel_of, loop, names_of, on_every_target, options_for
from tiers import full


@pytest.mark.parametrize(
    ("memory_format", "dtype", "channels", "key_dim", "kernels", "window"),
    [
        full("nchw", torch.float32, 128, 16, (7, 5, 3, 3), 7),
        ("channels_last", torch.bfloat16, 128, 16, (7, 5, 3, 3), 7),
        full("nchw", torch.float16, 384, 16, (7, 5, 3, 3), 4),
        ("nchw", torch.float32, 256, 128, (5, 5), 5),
        full("nchw", torch.bfloat16, 32, 8, (3, 3), 14),
    ],
    ids=str,
)
@on_every_target
def test_nothing_is_spilled(compiled, target, memory_format, dtype, channels, key_dim, kernels, window):
    from effattn._triton import cascaded_group_attention

    heads, tokens = len(kernels), window * window
    value_dim = channels // heads
    x = torch.empty(2, channels, 28, 28, dtype=dtype).to(memory_format=FORMATS[memory_format])
    weights = (
        [torch.empty(2 * key_dim + value_dim, value_dim, 1, 1) for _ in kernels],
        [torch.empty(2 * key_dim + value_dim) for _ in kernels],
        [torch.empty(key_dim, 1, k, k) for k in kernels],
        [torch.empty(key_dim) for _ in kernels],
        torch.empty(heads, tokens, tokens),
    )
    out, options = torch.empty_like(x), options_for(target)
    cascaded_group_attention.forward((out,), x, *weights, 0.25, window, window, options)
    cascaded_group_attention.backward((out, *weights), x, x, *weights, 0.25, window, window, options)
    names = [name for name in names_of(compiled) if name != "_add_up"]
    assert names == [
        "_cga_forward",
        "_cga_forward",
        "_cga_backward",
        "_weight_gradients",
        *["_depthwise_gradients"] * heads,
    ]


@on_every_target
def test_sizes_of_one(compiled, target):
    """Arguments that are 1 are constants to the compiler, and not to the interpreter."""
    from effattn._triton import cascaded_group_attention

    options, one = options_for(target), torch.empty
    t = one(1, 1, 1, 1)
    weights = ([one(3, 1, 1, 1)], [one(3)], [t], [one(1)], one(1, 1, 1))
    cascaded_group_attention.forward((t,), t, *weights, 1.0, 1, 1, options)
    cascaded_group_attention.backward((t, *weights), t, t, *weights, 1.0, 1, 1, options)
    assert names_of(compiled)


@pytest.mark.parametrize("target", ["sm_90"])
def test_budgets(compiled, target):
    """m4 stage 1: a head."""
    from effattn._triton import cascaded_group_attention

    x = torch.empty(256, 128, 14, 14, dtype=torch.bfloat16)
    kernels = (7, 5, 3, 3)
    weights = (
        [torch.empty(64, 32, 1, 1) for _ in kernels],
        [torch.empty(64) for _ in kernels],
        [torch.empty(16, 1, k, k) for k in kernels],
        [torch.empty(16) for _ in kernels],
        torch.empty(4, 49, 49),
    )
    cascaded_group_attention.forward((torch.empty_like(x),), x, *weights, 0.25, 7, 7, options_for(target))
    code, used = kernel_of(compiled, "_cga_forward")
    assert loop(code) <= 2380
    assert used <= 255
