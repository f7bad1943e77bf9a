"""cascaded_group_attention with the batch's BatchNorm behind every projection and convolution of q, for training.

Windows divide the image. eps are of the norms behind the projections, then of those behind the convolutions of q;
statistics are means, then variances over the batch (not corrected).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from effattn._tracing import static_shape
from effattn.ops._operator import Operator
from effattn.ops._plain import depthwise
from effattn.ops.cascaded_group_attention import cascade

Tensors = Sequence[torch.Tensor]

SIGNATURE = """
    x              image (positive B, heads * d, positive down * window_height, positive across * window_width)
    qkv_weights    weights[positive heads] (2 * key_dim + d, d, 1, 1)
    q_dw_weights   weights[heads] (positive key_dim, 1, odd k, k)
    qkv_norm_weights weights[heads] (2 * key_dim + d)
    qkv_norm_biases  weights[heads] (2 * key_dim + d)
    q_norm_weights weights[heads] (key_dim)
    q_norm_biases  weights[heads] (key_dim)
    attention_bias weight (heads, window_height * window_width, window_height * window_width)
    eps            numbers[2 * heads]
    scale          number
    window_height  integer 1..32767
    window_width   integer 1..32767
    ->
    out            kept (B, heads * d, down * window_height, across * window_width)
    statistics     (heads, 2, 3 * key_dim + d)
"""


def plain(
    x: torch.Tensor,
    qkv_weights: Sequence[torch.Tensor],
    q_dw_weights: Sequence[torch.Tensor],
    qkv_norm_weights: Sequence[torch.Tensor],
    qkv_norm_biases: Sequence[torch.Tensor],
    q_norm_weights: Sequence[torch.Tensor],
    q_norm_biases: Sequence[torch.Tensor],
    attention_bias: torch.Tensor,
    eps: Sequence[float],
    scale: float,
    window_height: int,
    window_width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, key_dim = len(qkv_weights), static_shape(q_dw_weights[0])[0]
    norm_weights, norm_biases = (*qkv_norm_weights, *q_norm_weights), (*qkv_norm_biases, *q_norm_biases)
    means: dict[int, torch.Tensor] = {}
    variances: dict[int, torch.Tensor] = {}

    def normalise(norm: int, t: torch.Tensor) -> torch.Tensor:
        variances[norm], means[norm] = torch.var_mean(t, dim=(0, 2, 3), correction=0)
        factor = norm_weights[norm].to(t.dtype) * (variances[norm] + eps[norm]).rsqrt()
        shift = norm_biases[norm].to(t.dtype) - means[norm] * factor
        return t * factor.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)

    def project(head: int, feat: torch.Tensor) -> torch.Tensor:
        return normalise(head, functional.conv2d(feat, qkv_weights[head].to(feat.dtype)))

    def convolve(head: int, q: torch.Tensor) -> torch.Tensor:
        return normalise(heads + head, depthwise(q, q_dw_weights[head], None))

    out = cascade(x, project, convolve, key_dim, attention_bias, scale, (window_height, window_width))
    statistics = [torch.cat([of[head], of[heads + head]]) for head in range(heads) for of in (means, variances)]
    return out, torch.stack(statistics).unflatten(0, (heads, 2)).detach()


def longest_sum(sizes: Mapping[str, Any]) -> int:
    tokens = sizes["down"] * sizes["window_height"] * sizes["across"] * sizes["window_width"]
    return max(sizes["B"] * tokens, 2 * sizes["key_dim"] + sizes["d"])


CASES = (
    {"B": 2, "heads": 2, "d": 4, "key_dim": 4, "down": 2, "across": 1, "k": (3, 5)}
    | {"window_height": 3, "window_width": 2, "eps": (1e-5,) * 4, "scale": 0.5},
)
OPERATOR = Operator(
    "cascaded_group_attention_batch_norm",
    SIGNATURE,
    plain,
    cases=CASES,
    longest_sum=longest_sum,
    dtypes=(torch.float32,),
)
