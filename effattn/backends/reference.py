"""Plain PyTorch, straight from the equations: the specification, and the way on every other device.

Everything is made of differentiable torch operations, so higher derivatives, forward mode and
``torch.func`` work through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional

from effattn._tracing import static_shape
from effattn.backends._base import Backend
from effattn.backends.packed import OUTPUTS, of_heads, rounded, unpack_projection

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leaves dtypes to the code inside; the meta device knows no autocast and refuses to be asked."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def relu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """EfficientViT (arXiv 2205.14756) eq. 2-4, in float32 at least, whatever autocast says."""
    with without_autocast(q.device):
        at_least = torch.promote_types(q.dtype, torch.float32)
        relu_q, relu_k = q.to(at_least).relu(), k.to(at_least).relu()
        numerator = relu_q @ (relu_k.transpose(-2, -1) @ v.to(at_least))
        denominator = relu_q @ relu_k.sum(-2).unsqueeze(-1)
        # An exporter for ONNX drops the addition of a scalar below 1e-8, and 0 / 0 would be left of it.
        added = denominator.new_full((1,), eps) if torch.onnx.is_in_onnx_export() else eps
        return (numerator / (denominator + added)).to(q.dtype)


def multi_scale_aggregation(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor],
    pw_biases: Sequence[torch.Tensor],
    head_dim: int,
) -> torch.Tensor:
    """EfficientViT (arXiv 2205.14756), section 3.1: k x k depthwise, then 1x1 in groups of head_dim channels."""
    at_least = torch.promote_types(qkv.dtype, torch.float32)
    with without_autocast(qkv.device):
        x, channels = qkv.to(at_least), static_shape(qkv)[1]
        scales = [x]
        for i, (dw, pw) in enumerate(zip(dw_weights, pw_weights, strict=True)):
            dw_bias, pw_bias = (biases[i].to(at_least) if biases else None for biases in (dw_biases, pw_biases))
            if math.prod(static_shape(qkv)) == 0:  # convolutions take no empty images
                scales.append(x * 1)
                continue
            padding = static_shape(dw)[-1] // 2
            mixed = functional.conv2d(x, dw.to(at_least), dw_bias, padding=padding, groups=channels)
            scales.append(functional.conv2d(mixed, pw.to(at_least), pw_bias, groups=channels // head_dim))
        return torch.cat(scales, dim=1).to(qkv.dtype)


def multi_scale_linear_attention(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor],
    pw_biases: Sequence[torch.Tensor],
    head_dim: int,
    eps: float,
) -> torch.Tensor:
    """ReLU linear attention in every head of :func:`multi_scale_aggregation`."""
    at_least = torch.promote_types(qkv.dtype, torch.float32)
    scales = multi_scale_aggregation(qkv.to(at_least), dw_weights, pw_weights, dw_biases, pw_biases, head_dim)
    (batch, _, height, width), channels = scales.shape, static_shape(scales)[1]
    heads = scales.reshape(batch, channels // (3 * head_dim), 3 * head_dim, height * width).transpose(-2, -1)
    q, k, v = heads.chunk(3, dim=-1)
    out = relu_linear_attention(q, k, v, eps)
    return out.transpose(-2, -1).reshape(batch, channels // 3, height, width).to(qkv.dtype)


def lite_mla(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor],
    pw_biases: Sequence[torch.Tensor],
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    head_dim: int,
    eps: float,
) -> torch.Tensor:
    """EfficientViT's module around :func:`multi_scale_linear_attention`, in evaluation with BatchNorm folded in."""
    at_least = torch.promote_types(x.dtype, torch.float32)

    qkv = _project(x.to(at_least), qkv_weight, qkv_bias)
    out = multi_scale_linear_attention(qkv, dw_weights, pw_weights, dw_biases, pw_biases, head_dim, eps)
    return _project(out, proj_weight, proj_bias).to(x.dtype)


def biased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    talking_heads: Sequence[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """EfficientFormer (arXiv 2206.01191) and, with talking heads, EfficientFormerV2 (arXiv 2212.08059)."""
    with without_autocast(q.device):
        at_least = torch.promote_types(q.dtype, torch.float32)
        logits = scale * (q.to(at_least) @ k.to(at_least).transpose(-2, -1)) + bias.to(at_least)
        weights = _mix_heads(logits, talking_heads[:2]).softmax(dim=-1)
        return (_mix_heads(weights, talking_heads[2:]) @ v.to(at_least)).to(q.dtype)


def _mix_heads(x: torch.Tensor, matrix_and_bias: Sequence[torch.Tensor]) -> torch.Tensor:
    if not matrix_and_bias:
        return x
    matrix, bias = (t.to(x.dtype) for t in matrix_and_bias)
    return torch.einsum("gh,bhnm->bgnm", matrix, x) + bias.reshape(-1, 1, 1)


def cascaded_group_attention(
    x: torch.Tensor,
    qkv_weights: Sequence[torch.Tensor],
    qkv_biases: Sequence[torch.Tensor],
    q_dw_weights: Sequence[torch.Tensor],
    q_dw_biases: Sequence[torch.Tensor],
    attention_bias: torch.Tensor,
    scale: float,
    window_height: int,
    window_width: int,
) -> torch.Tensor:
    """EfficientViT (arXiv 2305.07027), section 3.2, in windows with zeros behind the image's last row and column."""

    def project(head: int, feat: torch.Tensor) -> torch.Tensor:
        bias = qkv_biases[head].to(feat.dtype) if qkv_biases else None
        return functional.conv2d(feat, qkv_weights[head].to(feat.dtype), bias)

    def convolve(head: int, q: torch.Tensor) -> torch.Tensor:
        return _depthwise(q, q_dw_weights[head], q_dw_biases[head] if q_dw_biases else None)

    size = (window_height, window_width)
    return _cascade(x, project, convolve, static_shape(q_dw_weights[0])[0], attention_bias, scale, size)


def cascaded_group_attention_batch_norm(
    x: torch.Tensor,
    qkv_weights: Sequence[torch.Tensor],
    q_dw_weights: Sequence[torch.Tensor],
    norm_weights: Sequence[torch.Tensor],
    norm_biases: Sequence[torch.Tensor],
    attention_bias: torch.Tensor,
    eps: Sequence[float],
    scale: float,
    window_height: int,
    window_width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`cascaded_group_attention` with the batch's BatchNorm behind every projection and convolution of q."""
    heads, key_dim = len(qkv_weights), static_shape(q_dw_weights[0])[0]
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
        return normalise(heads + head, _depthwise(q, q_dw_weights[head], None))

    out = _cascade(x, project, convolve, key_dim, attention_bias, scale, (window_height, window_width))
    statistics = [torch.cat([of[head], of[heads + head]]) for head in range(heads) for of in (means, variances)]
    return out, torch.stack(statistics).unflatten(0, (heads, 2)).detach()


def _depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    side, channels = static_shape(weight)[-1], static_shape(weight)[0]
    return functional.conv2d(x, weight.to(x.dtype), bias, padding=side // 2, groups=channels)


def _cascade(
    x: torch.Tensor,
    project: Callable[[int, torch.Tensor], torch.Tensor],
    convolve: Callable[[int, torch.Tensor], torch.Tensor],
    key_dim: int,
    attention_bias: torch.Tensor,
    scale: float,
    size: tuple[int, int],
) -> torch.Tensor:
    """A head after the other, in windows; how a head makes q, k and v of its channels is the caller's."""
    at_least = torch.promote_types(x.dtype, torch.float32)
    (batch, _, height, width), (rows, cols) = x.shape, size
    _, channels, *whole = static_shape(x)
    heads = static_shape(attention_bias)[0]
    value_dim = channels // heads
    if math.prod(static_shape(x)) == 0:  # convolutions take no empty images
        return x * 1
    with without_autocast(x.device):
        windows = x.to(at_least)
        if whole != [rows, cols]:
            down, across = (height + rows - 1) // rows, (width + cols - 1) // cols
            padded = functional.pad(windows, (0, across * cols - width, 0, down * rows - height))
            windows = padded.reshape(batch, channels, down, rows, across, cols).permute(0, 2, 4, 1, 3, 5)
            windows = windows.reshape(-1, channels, rows, cols)
        outs: list[torch.Tensor] = []
        for i, group in enumerate(windows.chunk(heads, 1)):
            qkv = project(i, group if i == 0 else group + outs[-1])
            q, k, v = qkv.split([key_dim, key_dim, value_dim], dim=1)
            logits = scale * (convolve(i, q).flatten(2).transpose(-2, -1) @ k.flatten(2))
            logits = logits + attention_bias[i].to(at_least)
            out = v.flatten(2) @ logits.softmax(dim=-1).transpose(-2, -1)
            outs.append(out.reshape(-1, value_dim, rows, cols))
        image = torch.cat(outs, dim=1)
        if whole != [rows, cols]:
            windows = image.reshape(batch, down, across, channels, rows, cols).permute(0, 3, 1, 4, 2, 5)
            image = windows.reshape(batch, channels, down * rows, across * cols)[:, :, :height, :width]
        return image.to(x.dtype)


def cascaded_group_attention_projected(
    x: torch.Tensor,
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor,
    taps: torch.Tensor,
    tap_bias: torch.Tensor,
    attention_bias: torch.Tensor,
    proj: torch.Tensor,
    proj_bias: torch.Tensor,
    kernels: Sequence[int],
    key_dim: int,
    scale: float,
    window_height: int,
    window_width: int,
) -> torch.Tensor:
    """:func:`cascaded_group_attention`, relu and the 1x1 convolution behind it, in evaluation; weights packed."""
    at_least = torch.promote_types(x.dtype, torch.float32)
    sizes = [taps.shape[1], taps.shape[1], qkv.shape[2] - 2 * taps.shape[1]]
    dims = [key_dim, key_dim, x.shape[1] // len(kernels)]

    def parts(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([part[:dim] for part, dim in zip(t.split(sizes), dims, strict=True)])

    taps_of_heads = zip(taps.split([k * k for k in kernels]), kernels, strict=True)
    out = cascaded_group_attention(
        x.to(at_least),
        [parts(weight.mT).unsqueeze(-1).unsqueeze(-1) for weight in qkv],
        [parts(bias) for bias in qkv_bias],
        [t.mT[:key_dim].reshape(key_dim, 1, k, k) for t, k in taps_of_heads],
        [bias[:key_dim] for bias in tap_bias],
        attention_bias,
        scale,
        window_height,
        window_width,
    )
    return _project(out.relu(), unpack_projection(proj, len(proj_bias)), proj_bias).to(x.dtype)


def projected_attention(
    x: torch.Tensor,
    halving_taps: torch.Tensor | None,
    halving_bias: torch.Tensor | None,
    q: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor,
    bias: torch.Tensor,
    talking_heads: Sequence[torch.Tensor],
    taps: torch.Tensor | None,
    tap_bias: torch.Tensor | None,
    proj: torch.Tensor,
    proj_bias: torch.Tensor,
    key_dim: int,
    value_dim: int,
    scale: float,
    activation: int,
    out_height: int,
    out_width: int,
) -> torch.Tensor:
    """EfficientFormer's attention with its projections, in evaluation; weights packed."""
    image = x.to(torch.promote_types(x.dtype, torch.float32))
    q_image = image
    if halving_taps is not None and halving_bias is not None:
        taps_of_x = unpack_projection(halving_taps, x.shape[1])
        q_image = _depthwise_of_rows(image, taps_of_x, halving_bias[: x.shape[1]], stride=2)
        image = q_image if q is None else image
    heads = len(bias)
    keys, values = heads * rounded(key_dim), heads * rounded(value_dim)
    before_v = rounded(2 * keys if q is None else keys, OUTPUTS)
    weights, biases = unpack_projection(qkv, before_v + values), qkv_bias
    if q is not None and q_bias is not None:
        weights, biases = torch.cat([unpack_projection(q, keys), weights]), torch.cat([q_bias, biases])
        before_v += keys
    projected = [
        _project(of, of_heads(weights[first:], heads, dim), of_heads(biases[first:], heads, dim))
        for first, dim, of in ((0, key_dim, q_image), (keys, key_dim, image), (before_v, value_dim, image))
    ]
    q_heads, k, v = (t.flatten(2).reshape(x.shape[0], heads, t.shape[1] // heads, -1).mT for t in projected)
    size = projected[0].shape[2:]
    out = biased_attention(q_heads, k, v, bias, talking_heads, scale).mT.reshape(x.shape[0], heads * value_dim, *size)
    with without_autocast(x.device):
        if taps is not None and tap_bias is not None:
            taps = of_heads(unpack_projection(taps, values), heads, value_dim)
            local_bias = of_heads(tap_bias, heads, value_dim)
            out = out + _depthwise_of_rows(projected[2], taps, local_bias, stride=1 if q is None else 2)
        if size != (out_height, out_width):
            out = functional.interpolate(out, size=(out_height, out_width), mode="bilinear")
        out = (out, out.relu(), functional.gelu(out))[activation]
    matrix = of_heads(unpack_projection(proj, len(proj_bias)).mT, heads, value_dim).mT
    return _project(out, matrix, proj_bias).to(x.dtype)


def _depthwise_of_rows(image: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor, stride: int) -> torch.Tensor:
    """With taps (channels, k * k)."""
    side = math.isqrt(taps.shape[1])
    taps, bias = taps.reshape(-1, 1, side, side).to(image.dtype), bias.to(image.dtype)
    with without_autocast(image.device):
        return functional.conv2d(image, taps, bias, stride, side // 2, groups=image.shape[1])


def _project(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 1x1 convolution, for images that may be empty."""
    with without_autocast(image.device):
        bias = None if bias is None else bias.to(image.dtype)
        return functional.linear(image.movedim(1, -1), weight.to(image.dtype), bias).movedim(-1, 1)


def _unavailable() -> str | None:
    return None


def _reasons(op: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[str]:
    reasons = []
    if op not in FUNCTIONS:
        reasons.append(f"has no {op}")
    if dtype not in DTYPES:
        reasons.append(f"takes float64, float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}")
    return reasons


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "relu_linear_attention": relu_linear_attention,
    "multi_scale_aggregation": multi_scale_aggregation,
    "multi_scale_linear_attention": multi_scale_linear_attention,
    "lite_mla": lite_mla,
    "biased_attention": biased_attention,
    "cascaded_group_attention": cascaded_group_attention,
    "cascaded_group_attention_batch_norm": cascaded_group_attention_batch_norm,
    "cascaded_group_attention_projected": cascaded_group_attention_projected,
    "projected_attention": projected_attention,
}

BACKEND = Backend("reference", _unavailable, _reasons, FUNCTIONS)
