"""cascaded_group_attention on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

import effattn
from benchmarks.gpu.measured import BATCHES, Measured, Shape, Sizes
from benchmarks.gpu.runner import STOCK, Function
from effattn.ops import OPERATORS


def _sizes(batch: int, channels: int, key_dim: int, size: int, window: int, kernels: tuple[int, ...]) -> Sizes:
    heads = len(kernels)
    return {
        **{"B": batch, "heads": heads, "d": channels // heads, "key_dim": key_dim, "H": size, "W": size, "k": kernels},
        **{"scale": key_dim**-0.5, "window_height": window, "window_width": window},
    }


def _ours(*arguments: Any) -> torch.Tensor:
    *tensors, scale, rows, cols = arguments
    return effattn.cascaded_group_attention(*tensors, scale=scale, window_size=(rows, cols))


def _stock(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """As in the models, with windows by permutation; in the type of the image, as under autocast."""
    qkv, qkv_biases, dw, dw_biases, bias, scale, rows, cols = rest
    (batch, channels, height, width), heads = x.shape, len(qkv)
    down, across, key_dim = height // rows, width // cols, dw[0].shape[0]
    windows = x.reshape(batch, channels, down, rows, across, cols).permute(0, 2, 4, 1, 3, 5)
    outs: list[torch.Tensor] = []
    for i, group in enumerate(windows.reshape(-1, channels, rows, cols).chunk(heads, 1)):
        feat = group if i == 0 else group + outs[-1]
        made = functional.conv2d(feat, qkv[i].to(x.dtype), qkv_biases[i].to(x.dtype))
        q, k, v = made.split([key_dim, key_dim, channels // heads], dim=1)
        side = dw[i].shape[-1]
        q = functional.conv2d(q, dw[i].to(x.dtype), dw_biases[i].to(x.dtype), padding=side // 2, groups=key_dim)
        logits = scale * (q.flatten(2).mT @ k.flatten(2)) + bias[i].to(x.dtype)
        outs.append((v.flatten(2) @ logits.softmax(dim=-1).mT).reshape(-1, channels // heads, rows, cols))
    joined = torch.cat(outs, dim=1).reshape(batch, down, across, channels, rows, cols)
    return joined.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def _peers(sizes: Sizes) -> dict[str, Function]:
    return {STOCK: _stock}


def _flops(sizes: Sizes) -> int:
    d, key_dim, tokens = sizes["d"], sizes["key_dim"], sizes["window_height"] * sizes["window_width"]
    of_a_pixel = sum(2 * (d * (2 * key_dim + d) + k * k * key_dim + tokens * (key_dim + d)) for k in sizes["k"])
    return int(sizes["B"] * sizes["H"] * sizes["W"] * of_a_pixel)


SUITE = "gpu-cascade"
STAGE_1, M4 = "m4 stage 1", (7, 5, 3, 3)

MEASURED = Measured(
    OPERATORS["cascaded_group_attention"],
    _ours,
    _peers,
    _flops,
    tiny=(Shape("tiny", _sizes(1, 8, 4, 6, 3, (3, 3))),),
    smoke={
        "": [
            Shape("windows", _sizes(2, 32, 16, 14, 7, M4)),
            Shape("whole images", _sizes(1, 24, 16, 9, 9, (5, 3))),
        ]
    },
    suite=SUITE,
    title="cascaded group attention",
    shapes=(
        *(Shape(f"{STAGE_1}, batch {batch}", _sizes(batch, 128, 16, 14, 7, M4)) for batch in BATCHES),
        Shape("m4 stage 2, batch 1", _sizes(1, 256, 16, 7, 7, M4)),
        Shape("m4 stage 3, batch 256", _sizes(256, 384, 16, 4, 4, M4)),
        Shape("m5 stage 1 @896, batch 1", _sizes(1, 192, 16, 56, 7, (7, 5, 3))),
    ),
    main=(f"{SUITE}: {STAGE_1}, batch 1, bfloat16", f"{SUITE}: {STAGE_1}, batch 256, bfloat16"),
    profiled=(f"{SUITE}: {STAGE_1}, batch 256, bfloat16",),
    on_a_gpu={"": Shape("eight images", _sizes(8, 128, 16, 14, 7, M4))},
    memory=1.1,  # the backward keeps what every head had, in float32
)
