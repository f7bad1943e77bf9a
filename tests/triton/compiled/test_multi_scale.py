"""Multi-scale attention, compiled for GPUs that need not be there: no register is spilled, and what its loops take."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from no_gpu import FORMATS, kernel_of, loop, names_of, on_every_target, options_for
from tiers import full


@pytest.mark.parametrize(
    ("memory_format", "dtype", "head_dim", "kernel"),
    [
        full("nchw", torch.float32, 8, 3),
        ("channels_last", torch.bfloat16, 16, 5),
        full("nchw", torch.bfloat16, 32, 5),
        full("channels_last", torch.float32, 32, 5),
        full("nchw", torch.float32, 64, 7),
        ("nchw", torch.float16, 128, 5),
    ],
    ids=str,
)
@on_every_target
def test_nothing_is_spilled(compiled, target, memory_format, dtype, head_dim, kernel):
    from effattn._triton import multi_scale

    heads, options = 4, options_for(target)
    channels = 3 * heads * head_dim

    def image(channels):
        return torch.empty(2, channels, 64, 64, dtype=dtype).to(memory_format=FORMATS[memory_format])

    sizes = (channels, 1, kernel, kernel), (channels, head_dim, 1, 1), (channels,), (channels,)
    weights = [[torch.empty(size)] for size in sizes]
    sums = torch.empty(2, 2 * heads, head_dim + 1, head_dim)
    multi_scale.aggregate((image(2 * channels),), image(channels), *weights, head_dim, options)
    multi_scale.attend((image(2 * heads * head_dim), sums), image(channels), *weights, head_dim, 1e-15, options)
    multi_scale.aggregate_backward(
        (image(channels), *weights), image(2 * channels), image(channels), *weights, head_dim, options
    )
    names = [name for name in names_of(compiled) if name != "_add_up"]
    assert names == [
        *("_aggregate", "_accumulate_kv_state", "_attend"),
        *("_through_pointwise", "_pointwise_gradients", "_depthwise_gradients", "_input_gradients"),
    ]


@on_every_target
def test_sizes_of_one(compiled, target):
    """Arguments that are 1 are constants to the compiler, and not to the interpreter."""
    from effattn._triton import multi_scale

    options, one = options_for(target), torch.empty
    image, weights = one(1, 3, 1, 1), [[one(3, 1, 1, 1)], [one(3, 1, 1, 1)], [], []]
    multi_scale.attend((one(1, 2, 1, 1), one(1, 2, 2, 1)), image, *weights, 1, 1e-15, options)
    multi_scale.attend_backward((image, *weights), one(1, 2, 1, 1), image, *weights, one(1, 2, 2, 1), 1, 1e-15, options)
    assert names_of(compiled)


@pytest.mark.parametrize(("memory_format", "sums"), [("nchw", 1390), ("channels_last", 2260)])
@pytest.mark.parametrize("target", ["sm_90"])
def test_budgets(compiled, target, memory_format, sums):
    """b1 stage 3 at 1024 x 2048: 8 heads of 16 channels, 5 x 5, bfloat16."""
    from effattn._triton import multi_scale

    heads, head_dim = 8, 16
    channels = 3 * heads * head_dim

    def image(channels):
        return torch.empty(1, channels, 64, 128, dtype=torch.bfloat16).to(memory_format=FORMATS[memory_format])

    sizes = (channels, 1, 5, 5), (channels, head_dim, 1, 1), (channels,), (channels,)
    weights = [[torch.empty(size)] for size in sizes]
    kept = torch.empty(1, 2 * heads, head_dim + 1, head_dim)
    out = image(2 * heads * head_dim)
    multi_scale.attend((out, kept), image(channels), *weights, head_dim, 1e-15, options_for(target))
    code, used = kernel_of(compiled, "_accumulate_kv_state")
    assert loop(code) <= sums
    assert used <= 255
    assert kernel_of(compiled, "_attend")[1] <= 128
