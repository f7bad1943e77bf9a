"""relu_linear_attention, compiled for GPUs that need not be there: no register is spilled, and what its loops take."""

from __future__ import annotations

from itertools import product, starmap

import pytest
import torch

pytest.importorskip("triton")

from no_gpu import kernel_of, loop, names_of, on_every_target, options_for
from tiers import full


@pytest.mark.parametrize(
    ("layout", "dtype", "channels"),
    [
        ("token_major", torch.float32, (128, 128)),
        ("channel_major", torch.bfloat16, (32, 32)),
        *starmap(full, product(("token_major",), (torch.float32,), ((16, 16), (32, 32), (64, 64)))),
        *starmap(full, product(("channel_major",), (torch.bfloat16,), ((16, 16), (64, 64), (128, 128)))),
        full("token_major", torch.float16, (128, 8)),
    ],
    ids=str,
)
@on_every_target
def test_nothing_is_spilled(compiled, target, channels, dtype, layout):
    from effattn._triton import linear_attention

    def tensor(channels):
        sizes = (2, 4, 4096, channels) if layout == "token_major" else (2, 4, channels, 4096)
        t = torch.empty(sizes, dtype=dtype)
        return t if layout == "token_major" else t.mT

    head_dim, value_dim = channels
    options = options_for(target)
    sums = torch.empty(2, 4, value_dim + 1, head_dim)
    q, k, grad_q, grad_k = (tensor(head_dim) for _ in range(4))
    v, out, grad_out, grad_v = (tensor(value_dim) for _ in range(4))
    linear_attention.forward((out, sums), q, k, v, 1e-15, options)
    linear_attention.backward((grad_q, grad_k, grad_v), grad_out, q, k, v, sums, 1e-15, options)
    assert names_of(compiled) == [
        *("_accumulate_kv_state", "_add_up", "_attend"),
        *("_query_gradients", "_accumulate_kv_state", "_add_up", "_key_gradients"),
    ]


@on_every_target
def test_sizes_of_one(compiled, target):
    """Arguments that are 1 are constants to the compiler, and not to the interpreter."""
    from effattn._triton import linear_attention

    options, t, sums = options_for(target), torch.empty(1, 1, 1, 1), torch.empty(1, 1, 2, 1)
    linear_attention.forward((t, sums), t, t, t, 1e-15, options)
    linear_attention.backward((t, t, t), t, t, t, t, sums, 1e-15, options)
    assert names_of(compiled)


@pytest.mark.parametrize(
    ("layout", "sums", "attend"), [("token_major", 140, 430), ("channel_major", 120, 535)], ids=["tokens", "channels"]
)
@pytest.mark.parametrize("target", ["sm_90"])
def test_budgets(compiled, target, layout, sums, attend):
    """Heads of 32 channels in bfloat16."""
    from effattn._triton import linear_attention

    def tensor():
        sizes = (16, 36, 4096, 32) if layout == "token_major" else (16, 36, 32, 4096)
        t = torch.empty(sizes, dtype=torch.bfloat16)
        return t if layout == "token_major" else t.mT

    q, k, v, out = (tensor() for _ in range(4))
    linear_attention.forward((out, torch.empty(16, 36, 33, 32)), q, k, v, 1e-15, options_for(target))
    for name, instructions, registers in (("_accumulate_kv_state", sums, 96), ("_attend", attend, 112)):
        code, used = kernel_of(compiled, name)
        assert loop(code) <= instructions, name
        assert used <= registers, name
