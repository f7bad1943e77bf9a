"""biased_attention, compiled for GPUs that need not be there: no register is spilled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from no_gpu import names_of, on_every_target, options_for
from tiers import full


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "value_dim"),
    [
        full(torch.float32, 8, 32, 128),
        (torch.bfloat16, 8, 32, 128),
        full(torch.float16, 1, 8, 8),
        (torch.float32, 32, 128, 128),
        full(torch.bfloat16, 64, 64, 64),
    ],
    ids=str,
)
@on_every_target
def test_nothing_is_spilled(compiled, target, dtype, heads, head_dim, value_dim):
    from effattn._triton import biased_attention
    from effattn._triton import biased_attention_talking_heads as talking

    def tensor(channels):
        return torch.empty(2, heads, 49, channels, dtype=dtype)

    q, k, v, out = tensor(head_dim), tensor(head_dim), tensor(value_dim), tensor(value_dim)
    bias, options = torch.empty(heads, 49, 49), options_for(target)
    mixtures = tuple(torch.empty(size) for size in 2 * ((heads, heads), (heads,)))
    grads = (q, k, v, bias)
    biased_attention.forward((out,), q, k, v, bias, 0.1, options)
    biased_attention.backward(grads, out, q, k, v, bias, 0.1, options)
    multiplied = ["_multiply"] * 3
    assert [name for name in names_of(compiled) if name != "_add_up"] == ["_attend", "_softmax_gradients", *multiplied]
    compiled.clear()
    talking.forward((out,), q, k, v, bias, mixtures, 0.1, options)
    talking.backward((*grads, mixtures), out, q, k, v, bias, mixtures, 0.1, options)
    assert [name for name in names_of(compiled) if name != "_add_up"] == [
        *("_pairs", "_talking_heads", "_multiply"),
        *("_pairs", "_pairs", "_talking_heads_backward", *multiplied),
    ]


@on_every_target
def test_sizes_of_one(compiled, target):
    """Arguments that are 1 are constants to the compiler, and not to the interpreter."""
    from effattn._triton import biased_attention
    from effattn._triton import biased_attention_talking_heads as talking

    options, one = options_for(target), torch.empty
    t, bias, mixtures = one(1, 1, 1, 1), one(1, 1, 1), (one(1, 1), one(1), one(1, 1), one(1))
    biased_attention.forward((t,), t, t, t, bias, 1.0, options)
    biased_attention.backward((t, t, t, bias), t, t, t, t, bias, 1.0, options)
    talking.forward((t,), t, t, t, bias, mixtures, 1.0, options)
    talking.backward((t, t, t, bias, mixtures), t, t, t, t, bias, mixtures, 1.0, options)
    assert names_of(compiled)
