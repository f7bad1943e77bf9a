"""Every kernel as it is launched, compiled ahead of time for cards that need not be there: no register is spilled.

Each operator is compiled for its smallest and largest heads, and for those of the models, in both memory orders; in
the short tier for the largest and one of the models.
"""

from __future__ import annotations

import re
from itertools import product, starmap
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

# Behind the line above (E402): without triton these would be errors, not a skip.
from no_gpu import TARGETS, compile_only, cuobjdump, options_for  # noqa: E402
from tiers import full  # noqa: E402

from effattn.backends.triton import is_interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")

KERNELS = Path(__file__).parents[2] / "kernels" / "triton"


@pytest.fixture
def compiled(monkeypatch, target):
    """What launches compile for the target, in order; nothing runs."""
    return compile_only(monkeypatch, target)


def spilled(kernel) -> int:
    """Bytes of local memory that a kernel needs, or registers that it spills to memory.

    Scalar registers that AMD's compiler runs out of are kept in lanes of vector registers, which is no memory.
    """
    if "amdgcn" in kernel.asm:
        found = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", kernel.asm["amdgcn"])
        assert len(found) == 2
        return sum(map(int, found))
    (stack,) = re.findall(r"STACK:(\d+)", cuobjdump(kernel, "-res-usage"))
    return int(stack)


def registers(kernel) -> int:
    """Of a program, of 65536 that a multiprocessor of NVIDIA's has; AMD's compiler keeps to what there is."""
    if "amdgcn" in kernel.asm:
        return 0
    per_thread = re.search(r"REG:(\d+)", cuobjdump(kernel, "-res-usage"))
    return -(-int(per_thread[1]) // 8) * 8 * 32 * kernel.metadata.num_warps


def names_of(compiled) -> list[str]:
    """Of what was compiled, checked: nothing is spilled, and a program fits into a multiprocessor."""
    found = [(kernel.metadata.name, spilled(kernel)) for kernel in compiled]
    assert not any(bytes_or_registers for _, bytes_or_registers in found), found
    for kernel in compiled:
        assert registers(kernel) <= 65536, kernel.metadata.name
        # The least of the targets: gfx942.
        assert kernel.metadata.shared <= 65536, kernel.metadata.name
    return [name for name, _ in found]


#: One of each vendor in the short tier: what spills does so on all of a vendor's, or nearly.
SHORT = ("sm_90", "gfx942")
on_every_target = pytest.mark.parametrize("target", [name if name in SHORT else full(name) for name in TARGETS])
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


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
def test_relu_linear_attention_spills_nothing(compiled, target, channels, dtype, layout):
    from effattn._triton import relu_linear_attention

    def tensor(channels):
        sizes = (2, 4, 4096, channels) if layout == "token_major" else (2, 4, channels, 4096)
        t = torch.empty(sizes, dtype=dtype)
        return t if layout == "token_major" else t.mT

    head_dim, value_dim = channels
    options = options_for(target)
    sums = torch.empty(2, 4, value_dim + 1, head_dim)
    q, k, grad_q, grad_k = (tensor(head_dim) for _ in range(4))
    v, out, grad_out, grad_v = (tensor(value_dim) for _ in range(4))
    relu_linear_attention.forward(q, k, v, sums, out, 1e-15, options)
    relu_linear_attention.backward(grad_out, q, k, v, sums, (grad_q, grad_k, grad_v), 1e-15, options)
    assert names_of(compiled) == [
        *("_accumulate_kv_state", "_add_up", "_attend"),
        *("_query_gradients", "_accumulate_kv_state", "_add_up", "_key_gradients"),
    ]


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
def test_multi_scale_spills_nothing(compiled, target, memory_format, dtype, head_dim, kernel):
    from effattn._triton import multi_scale

    heads, options = 4, options_for(target)
    channels = 3 * heads * head_dim

    def image(channels):
        return torch.empty(2, channels, 64, 64, dtype=dtype).to(memory_format=FORMATS[memory_format])

    sizes = (channels, 1, kernel, kernel), (channels, head_dim, 1, 1), (channels,), (channels,)
    weights = [[torch.empty(size)] for size in sizes]
    sums = torch.empty(2, 2 * heads, head_dim + 1, head_dim)
    multi_scale.aggregate(image(channels), weights, image(2 * channels), head_dim, options)
    multi_scale.attend(image(channels), weights, sums, image(2 * heads * head_dim), head_dim, 1e-15, options)
    multi_scale.aggregate_backward(
        image(2 * channels), image(channels), weights, image(channels), weights, head_dim, options
    )
    names = [name for name in names_of(compiled) if name != "_add_up"]
    assert names == [
        *("_aggregate", "_accumulate_kv_state", "_attend"),
        *("_through_pointwise", "_pointwise_gradients", "_depthwise_gradients", "_input_gradients"),
    ]


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
def test_biased_attention_spills_nothing(compiled, target, dtype, heads, head_dim, value_dim):
    from effattn._triton import biased_attention, talking_heads

    def tensor(channels):
        return torch.empty(2, heads, 49, channels, dtype=dtype)

    q, k, v, out = tensor(head_dim), tensor(head_dim), tensor(value_dim), tensor(value_dim)
    bias, options = torch.empty(heads, 49, 49), options_for(target)
    mixtures = tuple(torch.empty(size) for size in 2 * ((heads, heads), (heads,)))
    grads = (q, k, v, bias)
    biased_attention.forward(q, k, v, bias, out, 0.1, options)
    biased_attention.backward(out, q, k, v, bias, grads, 0.1, options)
    multiplied = ["_multiply"] * 3
    assert [name for name in names_of(compiled) if name != "_add_up"] == ["_attend", "_softmax_gradients", *multiplied]
    compiled.clear()
    talking_heads.forward(q, k, v, bias, mixtures, out, 0.1, options)
    talking_heads.backward(out, q, k, v, bias, mixtures, grads, mixtures, 0.1, options)
    assert [name for name in names_of(compiled) if name != "_add_up"] == [
        *("_pairs", "_talking_heads", "_multiply"),
        *("_pairs", "_pairs", "_talking_heads_backward", *multiplied),
    ]


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
def test_cascaded_group_attention_spills_nothing(
    compiled, target, memory_format, dtype, channels, key_dim, kernels, window
):
    from effattn._triton import cascaded_group_attention

    heads, tokens = len(kernels), window * window
    value_dim = channels // heads
    x = torch.empty(2, channels, 28, 28, dtype=dtype).to(memory_format=FORMATS[memory_format])
    weights = cascaded_group_attention.Weights(
        [torch.empty(2 * key_dim + value_dim, value_dim, 1, 1) for _ in kernels],
        [torch.empty(2 * key_dim + value_dim) for _ in kernels],
        [torch.empty(key_dim, 1, k, k) for k in kernels],
        [torch.empty(key_dim) for _ in kernels],
        torch.empty(heads, tokens, tokens),
    )
    out, options = torch.empty_like(x), options_for(target)
    cascaded_group_attention.forward(x, weights, out, 0.25, (window, window), options)
    cascaded_group_attention.backward(x, x, weights, out, weights, 0.25, (window, window), options)
    names = [name for name in names_of(compiled) if name != "_add_up"]
    assert names == [
        "_cga_forward",
        "_cga_forward",
        "_cga_backward",
        "_weight_gradients",
        *["_depthwise_gradients"] * heads,
    ]


@on_every_target
def test_sizes_of_one_compile(compiled, target):
    """Arguments that are 1 are constants to the compiler, and not to the interpreter."""
    from effattn._triton import (
        biased_attention,
        cascaded_group_attention,
        multi_scale,
        relu_linear_attention,
        talking_heads,
    )

    options, one = options_for(target), torch.empty
    t, image = one(1, 1, 1, 1), one(1, 3, 1, 1)
    relu_linear_attention.forward(t, t, t, one(1, 1, 2, 1), t, 1e-15, options)
    relu_linear_attention.backward(t, t, t, t, one(1, 1, 2, 1), (t, t, t), 1e-15, options)
    weights = [[one(3, 1, 1, 1)], [one(3, 1, 1, 1)], [], []]
    multi_scale.attend(image, weights, one(1, 2, 2, 1), one(1, 2, 1, 1), 1, 1e-15, options)
    multi_scale.attend_backward(one(1, 2, 1, 1), image, weights, one(1, 2, 2, 1), image, weights, 1, 1e-15, options)
    bias, mixtures = one(1, 1, 1), (one(1, 1), one(1), one(1, 1), one(1))
    biased_attention.forward(t, t, t, bias, t, 1.0, options)
    biased_attention.backward(t, t, t, t, bias, (t, t, t, bias), 1.0, options)
    talking_heads.forward(t, t, t, bias, mixtures, t, 1.0, options)
    talking_heads.backward(t, t, t, t, bias, mixtures, (t, t, t, bias), mixtures, 1.0, options)
    cascade = cascaded_group_attention.Weights([one(3, 1, 1, 1)], [one(3)], [one(1, 1, 1, 1)], [one(1)], bias)
    cascaded_group_attention.forward(t, cascade, t, 1.0, (1, 1), options)
    cascaded_group_attention.backward(t, t, cascade, t, cascade, 1.0, (1, 1), options)
    assert len(names_of(compiled)) >= 30


def test_every_kernel_is_compiled_above():
    """A kernel that is launched stands in one of the lists."""
    launched = set()
    for path in KERNELS.glob("*.py"):
        launched |= set(re.findall(r"^\s+(_\w+)\[", path.read_text(), re.MULTILINE))
    here = Path(__file__).read_text()
    assert len(launched) >= 17
    assert all(f'"{name}"' in here for name in launched), launched
