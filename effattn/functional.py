"""The functions that users call: they normalise arguments and hand over to the operators."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from effattn._tracing import NOT_SCRIPTABLE, static_shape
from effattn.ops import OPERATORS


def relu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, eps: float = 1e-15) -> torch.Tensor:
    r"""ReLU linear attention, in time and memory linear in the number of tokens.

    .. math:: out_n = \frac{relu(q_n) \sum_m relu(k_m)^T v_m}{relu(q_n) \cdot \sum_m relu(k_m) + eps}

    EfficientViT (arXiv 2205.14756), eq. 2-4. Any strides are taken without a copy: token-major
    (channels contiguous) and channel-major (tokens contiguous, what a convolution on NCHW leaves
    behind) are both fast. Sums are kept in float32, so float16 neither overflows nor loses ``eps``;
    under autocast, arguments of different dtypes are promoted to the widest. Results are the same bits
    from run to run and for every number of threads. Differentiable to any order; ``torch.func``
    transforms and forward mode run through the plain PyTorch reference.

    Args:
        q: queries, (..., N, D), float16, bfloat16, float32 or float64.
        k: keys, (..., M, D), of q's dtype and device, with the leading sizes of q (``expand`` for
            broadcasting; it copies nothing).
        v: values, (..., M, Dv). M may differ from N and Dv from D.
        eps: added to the denominator, finite and >= 0. 1e-15 in the official code, 1e-5 in timm.

    Returns:
        (..., N, Dv), of q's dtype and in q's memory order.

    Raises:
        TypeError: for anything but dense floating-point tensors of one dtype.
        ValueError: for sizes that do not fit, different devices, or an eps out of range.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(relu_linear_attention, (q, k, v), q, k, v, eps=eps)
    if torch.compiler.is_compiling() or not _are_of_one_dtype(q, k, v):
        q, k, v = _promoted_by_autocast(q, k, v)
    return OPERATORS["relu_linear_attention"](q, k, v, eps)


def multi_scale_aggregation(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor] | None = None,
    pw_biases: Sequence[torch.Tensor] | None = None,
    *,
    head_dim: int,
) -> torch.Tensor:
    r"""Aggregates the tokens around each token, once a scale: a depthwise k x k convolution, then a 1x1
    convolution in groups of ``head_dim`` channels, with zeros around the image.

    .. math:: scale_i = pw_i * (dw_i * qkv), \qquad out = [qkv, scale_1, ..., scale_S]

    EfficientViT (arXiv 2205.14756), section 3.1. The result of the depthwise convolution never goes to memory.
    Both memory formats are taken without a copy. Deterministic and differentiable to any order like
    :func:`relu_linear_attention`.

    Args:
        qkv: (B, 3 * heads * head_dim, H, W), NCHW or channels_last, float16, bfloat16, float32 or float64; the
            channels of a head are ``head_dim`` of q, of k and of v. Any H and W.
        dw_weights: a tensor (C, 1, k, k) a scale, C the channels of qkv, k odd; of qkv's dtype or float32.
        pw_weights: a tensor (C, head_dim, 1, 1) a scale. Both are the weights of :class:`torch.nn.Conv2d`.
        dw_biases: a tensor (C,) a scale, or None.
        pw_biases: a tensor (C,) a scale, or None.
        head_dim: D, positive.

    Returns:
        (B, (1 + S) * C, H, W), of qkv's dtype and memory format: further scales are further heads.

    Raises:
        TypeError: for anything but dense floating-point tensors of fitting dtypes.
        ValueError: for sizes that do not fit, or different devices.
    """
    if has_torch_function((qkv,)):
        weights = (dw_weights, pw_weights, dw_biases, pw_biases)
        return handle_torch_function(multi_scale_aggregation, (qkv,), qkv, *weights, head_dim=head_dim)
    return OPERATORS["multi_scale_aggregation"](
        qkv,
        dw_weights,
        pw_weights,
        _or_empty(dw_biases),
        _or_empty(pw_biases),
        head_dim,
    )


def multi_scale_linear_attention(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor] | None = None,
    pw_biases: Sequence[torch.Tensor] | None = None,
    *,
    head_dim: int,
    eps: float = 1e-15,
) -> torch.Tensor:
    """:func:`relu_linear_attention` in every head of :func:`multi_scale_aggregation`, in one pass.

    The attention of EfficientViT (arXiv 2205.14756), figure 2, without its projections. The concatenated scales
    never reach memory: the forward pass writes the output alone, the backward pass keeps qkv and two small
    sums a head. One formula for any number of tokens; where the official code takes a quadratic path
    (H * W <= D), the result is the same.

    Args:
        qkv, dw_weights, pw_weights, dw_biases, pw_biases, head_dim: as in :func:`multi_scale_aggregation`.
        eps: added to the denominator, finite and >= 0. 1e-15 in the official code, 1e-5 in timm.

    Returns:
        (B, (1 + S) * heads * head_dim, H, W), of qkv's dtype and memory format; the heads of qkv first, then those
        of each scale.

    Raises:
        TypeError, ValueError: as :func:`multi_scale_aggregation`, and for an eps out of range.
    """
    if has_torch_function((qkv,)):
        weights = (dw_weights, pw_weights, dw_biases, pw_biases)
        return handle_torch_function(multi_scale_linear_attention, (qkv,), qkv, *weights, head_dim=head_dim, eps=eps)
    weights = (dw_weights, pw_weights, _or_empty(dw_biases), _or_empty(pw_biases))
    return OPERATORS["multi_scale_linear_attention"](qkv, *weights, head_dim, eps)


def biased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *,
    scale: float | None = None,
    talking_heads: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    r"""Softmax attention with a learned bias on every pair of tokens, with or without talking heads.

    .. math:: out = softmax(scale \cdot q k^T + bias) v

    EfficientFormer (arXiv 2206.01191), and with talking heads EfficientFormerV2 (arXiv 2212.08059): a 1x1 convolution
    over the heads before and one behind the softmax,

    .. math:: P = softmax(W_1 (scale \cdot q k^T + bias) + b_1), \qquad out = (W_2 P + b_2) v

    Made for the tens to hundreds of tokens at the end of these networks: all logits of a block of queries are in cache
    at once, in float32. Any strides are taken. Deterministic and differentiable to any order like
    :func:`relu_linear_attention`.

    Args:
        q: queries, (B, heads, N, D), float16, bfloat16, float32 or float64.
        k: keys, (B, heads, M, D), of q's dtype and device.
        v: values, (B, heads, M, Dv).
        bias: (heads, N, M), of q's dtype or float32.
        scale: of the logits, finite; by default ``D ** -0.5``.
        talking_heads: (W_1, b_1, W_2, b_2), matrices (heads, heads) and vectors (heads,), of q's dtype or float32; or
            None.

    Returns:
        (B, heads, N, Dv), of q's dtype and in q's memory order.

    Raises:
        TypeError: for anything but dense floating-point tensors of fitting dtypes.
        ValueError: for sizes that do not fit, different devices, or a scale that is not finite.
    """
    if has_torch_function((q, k, v, bias)):
        options: dict[str, Any] = {"scale": scale, "talking_heads": talking_heads}
        return handle_torch_function(biased_attention, (q, k, v, bias), q, k, v, bias, **options)
    if torch.compiler.is_compiling() or not _are_of_one_dtype(q, k, v):
        q, k, v = _promoted_by_autocast(q, k, v)
    if scale is None:
        scale = _default_scale(q, -1)
    return OPERATORS["biased_attention"](q, k, v, bias, _or_empty(talking_heads), scale)


def cascaded_group_attention(
    x: torch.Tensor,
    qkv_weights: Sequence[torch.Tensor],
    qkv_biases: Sequence[torch.Tensor] | None,
    q_dw_weights: Sequence[torch.Tensor],
    q_dw_biases: Sequence[torch.Tensor] | None,
    attention_bias: torch.Tensor,
    *,
    scale: float | None = None,
    window_size: int | Sequence[int] | None = None,
) -> torch.Tensor:
    r"""Cascaded group attention: every head attends to its group of channels and hands its output to the next.

    .. math::

        feat_i &= x_i + out_{i-1}, \qquad [q, k, v] = qkv_i * feat_i, \qquad q' = dw_i * q

        out_i &= softmax(scale \cdot q' k^T + bias_i) v

    EfficientViT of Microsoft (arXiv 2305.07027), section 3.2, up to the relu and the projection behind it. A window
    stays in one thread's cache from its input to its output; partition, padding and reversal are index arithmetic.
    Deterministic and differentiable to any order like :func:`relu_linear_attention`.

    Args:
        x: (B, C, H, W), NCHW or channels_last, float16, bfloat16, float32 or float64. Any H and W.
        qkv_weights: a tensor (2 * key_dim + d, d, 1, 1) a head, d = C / heads: the weights of a 1x1
            :class:`torch.nn.Conv2d`, in the order q, k, v; of x's dtype or float32. Their number is that of the heads.
        qkv_biases: a tensor (2 * key_dim + d,) a head, or None.
        q_dw_weights: a tensor (key_dim, 1, k, k) a head, of a depthwise convolution of q; k odd, and may differ from
            head to head.
        q_dw_biases: a tensor (key_dim,) a head, or None.
        attention_bias: (heads, N, N), N the tokens of a window.
        scale: of the logits, finite; by default ``key_dim ** -0.5``.
        window_size: (window_height, window_width), or an int for both, 1 to 32767. Attends in windows of that size,
            with zeros below and right of the image, which take part as in the published models; None: one window as
            large as the image.

    Returns:
        (B, C, H, W), of x's dtype and memory format: the heads' outputs, one behind the other.

    Raises:
        TypeError: for anything but dense floating-point tensors of fitting dtypes.
        ValueError: for sizes that do not fit, different devices, a window without tokens, or an infinite scale.
    """
    if has_torch_function((x,)):
        weights = (qkv_weights, qkv_biases, q_dw_weights, q_dw_biases, attention_bias)
        return handle_torch_function(cascaded_group_attention, (x,), x, *weights, scale=scale, window_size=window_size)
    if window_size is None:
        height, width = (max(size, 1) for size in static_shape(x)[2:]) if _has_dims(x, 4) else (1, 1)
    else:
        window = window_size if isinstance(window_size, Sequence) else (window_size, window_size)
        # In torch.jit.trace sizes are tensors, which the operator makes numbers of.
        sizes = (Integral, torch.SymInt, torch.Tensor) if torch.jit.is_tracing() else (Integral, torch.SymInt)
        if not all(isinstance(size, sizes) and not isinstance(size, bool) for size in window):
            raise TypeError(f"window_size: expected an int, two of them or None, got {window_size!r}")
        if len(window) != 2:
            raise ValueError(f"window_size: expected an int, two of them or None, got {window_size!r}")
        height, width = window
    if scale is None:
        scale = _default_scale(q_dw_weights[0], 0) if isinstance(q_dw_weights, Sequence) and q_dw_weights else 1.0
    weights = (qkv_weights, _or_empty(qkv_biases), q_dw_weights, _or_empty(q_dw_biases), attention_bias)
    return OPERATORS["cascaded_group_attention"](x, *weights, scale, height, width)


# Names, and not made of what is above: type checkers and the site read them without importing anything.
__all__ = [
    "biased_attention",
    "cascaded_group_attention",
    "multi_scale_aggregation",
    "multi_scale_linear_attention",
    "relu_linear_attention",
]
for _name in __all__:
    vars()[_name].__dict__["__script_unsupported"] = NOT_SCRIPTABLE  # where torch.jit.script looks for it


def _promoted_by_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The arguments in their widest dtype if autocast is on; unchanged where they agree already."""
    floating = all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors)
    # The meta device knows no autocast and refuses to be asked.
    if floating and tensors[0].device.type != "meta" and torch.is_autocast_enabled(tensors[0].device.type):
        widest = tensors[0].dtype
        for t in tensors[1:]:
            widest = torch.promote_types(widest, t.dtype)
        return tuple(t.to(widest) for t in tensors)
    return tensors


def _are_of_one_dtype(q: Any, k: Any, v: Any) -> bool:
    """Of tensors; others are left to the operator, which refuses them by name."""
    try:
        return bool(q.dtype == k.dtype == v.dtype)
    except AttributeError:
        return True


def _has_dims(t: Any, dims: int) -> bool:
    return isinstance(t, torch.Tensor) and t.dim() == dims


def _default_scale(t: Any, dim: int) -> float:
    """The size of a dimension to the power of -0.5; anything for what the operator will refuse."""
    return max(static_shape(t)[dim], 1) ** -0.5 if isinstance(t, torch.Tensor) and t.dim() > 0 else 1.0


def _or_empty(tensors: Sequence[torch.Tensor] | None) -> Sequence[torch.Tensor]:
    return () if tensors is None else tensors
