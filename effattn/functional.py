"""The functions that users call: they explain wrong arguments and hand over to the operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from effattn._tracing import NOT_SCRIPTABLE, static_shape, untraced
from effattn.ops import biased_attention as _biased_attention
from effattn.ops import cascaded_group_attention as _cascaded_group_attention
from effattn.ops import multi_scale as _multi_scale
from effattn.ops import relu_linear_attention as _relu_linear_attention

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    if torch.compiler.is_compiling():
        q, k, v = _promoted_by_autocast(q, k, v)
        _raise_if_wrong(_wrong_arguments, q, k, v, eps)
        return _relu_linear_attention.relu_linear_attention(q, k, v, eps)
    try:
        if not (q.dtype == k.dtype == v.dtype):
            q, k, v = _promoted_by_autocast(q, k, v)
        return _relu_linear_attention.relu_linear_attention(q, k, v, eps)
    except Exception:
        # Operators check everything themselves, so a good call pays for no check in Python; a bad
        # one is looked at here, to say it in terms of this function.
        _raise_if_wrong(_wrong_arguments, q, k, v, eps)
        raise


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
    arguments = (qkv, dw_weights, pw_weights, dw_biases, pw_biases, head_dim)
    if torch.compiler.is_compiling():
        _raise_if_wrong(_wrong_multi_scale, *arguments, 0.0)
    try:
        return _multi_scale.multi_scale_aggregation(
            qkv, dw_weights, pw_weights, dw_biases or (), pw_biases or (), head_dim
        )
    except Exception:
        _raise_if_wrong(_wrong_multi_scale, *arguments, 0.0)
        raise


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
    arguments = (qkv, dw_weights, pw_weights, dw_biases, pw_biases, head_dim, eps)
    if torch.compiler.is_compiling():
        _raise_if_wrong(_wrong_multi_scale, *arguments)
    try:
        return _multi_scale.multi_scale_linear_attention(
            qkv, dw_weights, pw_weights, dw_biases or (), pw_biases or (), head_dim, eps
        )
    except Exception:
        _raise_if_wrong(_wrong_multi_scale, *arguments)
        raise


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
    if torch.compiler.is_compiling():
        q, k, v = _promoted_by_autocast(q, k, v)
        _raise_if_wrong(_wrong_biased_attention, q, k, v, bias, scale, talking_heads)
    try:
        if not (q.dtype == k.dtype == v.dtype):
            q, k, v = _promoted_by_autocast(q, k, v)
        used = max(static_shape(q)[-1], 1) ** -0.5 if scale is None else scale
        return _biased_attention.biased_attention(q, k, v, bias, talking_heads or (), used)
    except Exception:
        _raise_if_wrong(_wrong_biased_attention, q, k, v, bias, scale, talking_heads)
        raise


def cascaded_group_attention(
    x: torch.Tensor,
    qkv_weights: Sequence[torch.Tensor],
    qkv_biases: Sequence[torch.Tensor] | None,
    q_dw_weights: Sequence[torch.Tensor],
    q_dw_biases: Sequence[torch.Tensor] | None,
    attention_bias: torch.Tensor,
    *,
    scale: float | None = None,
    window_size: int | tuple[int, int] | None = None,
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
        qkv_weights: a tensor (2 * key_dim + C / heads, C / heads, 1, 1) a head: the weights of a 1x1
            :class:`torch.nn.Conv2d`, in the order q, k, v; of x's dtype or float32. Their number is that of the heads.
        qkv_biases: a tensor (2 * key_dim + C / heads,) a head, or None.
        q_dw_weights: a tensor (key_dim, 1, k, k) a head, of a depthwise convolution of q; k odd, and may differ from
            head to head.
        q_dw_biases: a tensor (key_dim,) a head, or None.
        attention_bias: (heads, N, N), N the tokens of a window.
        scale: of the logits, finite; by default ``key_dim ** -0.5``.
        window_size: attends in windows of this height and width, with zeros below and right of the image, which take
            part as in the published models; None: one window as large as the image.

    Returns:
        (B, C, H, W), of x's dtype and memory format: the heads' outputs, one behind the other.

    Raises:
        TypeError: for anything but dense floating-point tensors of fitting dtypes.
        ValueError: for sizes that do not fit, different devices, a window without tokens, or an infinite scale.
    """
    if has_torch_function((x,)):
        weights = (qkv_weights, qkv_biases, q_dw_weights, q_dw_biases, attention_bias)
        return handle_torch_function(cascaded_group_attention, (x,), x, *weights, scale=scale, window_size=window_size)
    arguments = (x, qkv_weights, qkv_biases, q_dw_weights, q_dw_biases, attention_bias, scale, window_size)
    if torch.compiler.is_compiling():
        _raise_if_wrong(_wrong_cascade, *arguments)
    try:
        if window_size is None:
            height, width = (max(size, 1) for size in static_shape(x)[2:])
        else:
            height, width = window_size if isinstance(window_size, tuple) else (window_size, window_size)
        used = max(static_shape(q_dw_weights[0])[0], 1) ** -0.5 if scale is None else scale
        return _cascaded_group_attention.cascaded_group_attention(
            x, qkv_weights, qkv_biases or (), q_dw_weights, q_dw_biases or (), attention_bias, used, height, width
        )
    except Exception:
        _raise_if_wrong(_wrong_cascade, *arguments)
        raise


for _function in (
    relu_linear_attention,
    multi_scale_aggregation,
    multi_scale_linear_attention,
    biased_attention,
    cascaded_group_attention,
):
    _function.__dict__["__script_unsupported"] = NOT_SCRIPTABLE  # where torch.jit.script looks for it


def _raise_if_wrong(wrong: Callable[..., Exception | None], *arguments: Any) -> None:
    """Raises what is wrong with the arguments, if anything."""
    if torch.compiler.is_compiling() or not torch.jit.is_tracing():
        error = wrong(*arguments)
    else:
        with untraced():
            # Sizes that a trace made tensors of are numbers again.
            numbers = (a.item() if isinstance(a, torch.Tensor) and a.dim() == 0 else a for a in arguments)
            error = wrong(*numbers)
    if error is not None:
        raise error from None


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


def _wrong_tensor(name: str, tensor: object, at_least: int = 2) -> Exception | None:
    if not isinstance(tensor, torch.Tensor):
        return TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        return TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.dtype not in _FLOATING:
        return TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.dim() < at_least:
        what = " (..., tokens, channels)" if at_least == 2 else ""
        return ValueError(f"{name}: expected at least {at_least} dimensions{what}, got shape {_shape(tensor)}")
    return None


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _wrong_arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> Exception | None:
    """The first thing wrong with the arguments, as the error to raise; None if nothing is."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        wrong = _wrong_tensor(name, tensor)
        if wrong is not None:
            return wrong
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            return TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            return ValueError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")
        if tensor.shape[:-2] != q.shape[:-2]:
            return ValueError(
                f"{name}: expected the leading sizes of q, {tuple(q.shape[:-2])}, got shape {_shape(tensor)}"
            )
    if k.shape[-1] != q.shape[-1]:
        return ValueError(f"k: expected the head_dim of q, {q.shape[-1]}, got shape {_shape(k)}")
    if v.shape[-2] != k.shape[-2]:
        return ValueError(f"v: expected as many tokens as k, {k.shape[-2]}, got shape {_shape(v)}")
    return _wrong_eps(eps)


def _wrong_biased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scale: float | None,
    talking_heads: Sequence[torch.Tensor] | None,
) -> Exception | None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        wrong = _wrong_tensor(name, tensor)
        if wrong is not None:
            return wrong
        if tensor.dim() != 4:
            return ValueError(f"{name}: expected 4 dimensions (B, heads, tokens, channels), got shape {_shape(tensor)}")
    wrong = _wrong_arguments(q, k, v, 0.0)
    if wrong is not None:
        return wrong
    heads = q.shape[1]
    expected: dict[str, tuple[object, tuple[int, ...]]] = {"bias": (bias, (heads, q.shape[2], k.shape[2]))}
    if talking_heads is not None and not (isinstance(talking_heads, Sequence) and len(talking_heads) == 0):
        if not isinstance(talking_heads, Sequence) or isinstance(talking_heads, str):
            return TypeError(f"talking_heads: expected a sequence of tensors, got {type(talking_heads).__name__}")
        if len(talking_heads) != 4:
            return ValueError(f"talking_heads: expected two matrices, each with its bias, got {len(talking_heads)}")
        for i, tensor in enumerate(talking_heads):
            expected[f"talking_heads[{i}]"] = (tensor, (heads,) if i % 2 else (heads, heads))
    for name, (tensor, shape) in expected.items():
        wrong = _wrong_parameter(name, tensor, shape, "q", q)
        if wrong is not None:
            return wrong
    return _wrong_scale(scale)


def _wrong_cascade(
    x: torch.Tensor,
    qkv_weights: Sequence[torch.Tensor],
    qkv_biases: Sequence[torch.Tensor] | None,
    q_dw_weights: Sequence[torch.Tensor],
    q_dw_biases: Sequence[torch.Tensor] | None,
    attention_bias: torch.Tensor,
    scale: float | None,
    window_size: int | tuple[int, int] | None,
) -> Exception | None:
    wrong = _wrong_tensor("x", x)
    if wrong is not None:
        return wrong
    if x.dim() != 4:
        return ValueError(f"x: expected 4 dimensions (B, C, H, W), got shape {_shape(x)}")
    lists = {
        "qkv_weights": qkv_weights,
        "qkv_biases": qkv_biases,
        "q_dw_weights": q_dw_weights,
        "q_dw_biases": q_dw_biases,
    }
    wrong = _wrong_lists(lists, "head")
    if wrong is not None:
        return wrong
    heads = len(qkv_weights)
    if heads == 0:
        return ValueError("qkv_weights: expected a tensor a head, got none")
    if x.shape[1] % heads != 0:
        return ValueError(f"x: expected a multiple of {heads} channels, one group a head, got shape {_shape(x)}")
    for i, weight in enumerate(q_dw_weights):
        wrong = _wrong_tensor(f"q_dw_weights[{i}]", weight, at_least=4)
        if wrong is not None:
            return wrong
        if weight.shape[-1] % 2 == 0:
            return ValueError(f"q_dw_weights[{i}]: expected an odd kernel size, got shape {_shape(weight)}")
    value_dim, key_dim = x.shape[1] // heads, q_dw_weights[0].shape[0]
    if key_dim == 0:
        return ValueError(f"q_dw_weights[0]: expected a positive key_dim, got shape {_shape(q_dw_weights[0])}")
    sizes = {
        "qkv_weights": (2 * key_dim + value_dim, value_dim, 1, 1),
        "qkv_biases": (2 * key_dim + value_dim,),
        "q_dw_biases": (key_dim,),
    }
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors or ()):
            shape = sizes[name] if name in sizes else (key_dim, 1, tensor.shape[-1], tensor.shape[-1])
            wrong = _wrong_parameter(f"{name}[{i}]", tensor, shape, "x", x)
            if wrong is not None:
                return wrong
    wrong = _wrong_window(window_size)
    if wrong is not None:
        return wrong
    window = tuple(x.shape[2:]) if window_size is None else window_size
    height, width = (window, window) if isinstance(window, int) else window
    tokens = max(height, 1) * max(width, 1)
    wrong = _wrong_parameter("attention_bias", attention_bias, (heads, tokens, tokens), "x", x)
    return wrong if wrong is not None else _wrong_scale(scale)


def _wrong_lists(lists: dict[str, Sequence[torch.Tensor] | None], unit: str) -> Exception | None:
    """Lists of weights with a tensor for each ``unit``, as many as the first has; biases may be missing."""
    first, *_ = lists
    for name, tensors in lists.items():
        if name.endswith("biases") and (tensors is None or (isinstance(tensors, Sequence) and len(tensors) == 0)):
            continue
        if not isinstance(tensors, Sequence):
            return TypeError(f"{name}: expected a sequence of tensors, got {type(tensors).__name__}")
        expected = len(lists[first] or ())
        if len(tensors) != expected:
            return ValueError(f"{name}: expected a tensor a {unit} like {first}, {expected}, got {len(tensors)}")
    return None


_MOST_SIDE = 1 << 15  # of a window, as the compiled operators have it


def _wrong_window(window_size: object) -> Exception | None:
    if window_size is None:
        return None
    sizes = window_size if isinstance(window_size, tuple) else (window_size, window_size)
    if len(sizes) != 2 or any(not isinstance(size, int) or isinstance(size, bool) for size in sizes):
        return TypeError(f"window_size: expected an int, two of them or None, got {window_size!r}")
    if min(sizes) < 1 or max(sizes) >= _MOST_SIDE:
        return ValueError(f"window_size: expected positive numbers below {_MOST_SIDE}, got {window_size}")
    return None


def _wrong_scale(scale: object) -> Exception | None:
    if scale is None:
        return None
    if not isinstance(scale, Real) or isinstance(scale, bool):
        return TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not -math.inf < float(scale) < math.inf:  # math.isfinite takes no number of a dynamic graph
        return ValueError(f"scale: expected a finite number, got {scale}")
    return None


def _wrong_parameter(
    name: str, tensor: object, shape: tuple[int, ...], of: str, image: torch.Tensor
) -> Exception | None:
    """A weight or a bias that goes with the tensor ``image`` named ``of``."""
    wrong = _wrong_tensor(name, tensor, at_least=len(shape))
    if wrong is not None:
        return wrong
    assert isinstance(tensor, torch.Tensor)
    if tensor.dtype not in (image.dtype, torch.float32):
        return TypeError(f"{name}: expected the dtype of {of}, {image.dtype}, or float32, got {tensor.dtype}")
    if tensor.device != image.device:
        return ValueError(f"{name}: expected the device of {of}, {image.device}, got {tensor.device}")
    if _shape(tensor) != shape:
        return ValueError(f"{name}: expected shape {shape}, got {_shape(tensor)}")
    return None


def _wrong_eps(eps: object) -> Exception | None:
    if not isinstance(eps, Real) or isinstance(eps, bool):
        return TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= float(eps) < math.inf:
        return ValueError(f"eps: expected a finite number >= 0, got {eps}")
    return None


def _wrong_multi_scale(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dw_biases: Sequence[torch.Tensor] | None,
    pw_biases: Sequence[torch.Tensor] | None,
    head_dim: int,
    eps: float,
) -> Exception | None:
    wrong = _wrong_tensor("qkv", qkv)
    if wrong is not None:
        return wrong
    if qkv.dim() != 4:
        return ValueError(f"qkv: expected 4 dimensions (B, C, H, W), got shape {_shape(qkv)}")
    if not isinstance(head_dim, int) or isinstance(head_dim, bool):
        return TypeError(f"head_dim: expected an int, got {type(head_dim).__name__}")
    if head_dim < 1:
        return ValueError(f"head_dim: expected a positive number, got {head_dim}")
    channels = qkv.shape[1]
    if channels % (3 * head_dim) != 0:
        return ValueError(
            f"qkv: expected a multiple of 3 * head_dim = {3 * head_dim} channels, got shape {_shape(qkv)}"
        )
    lists = {"dw_weights": dw_weights, "pw_weights": pw_weights, "dw_biases": dw_biases, "pw_biases": pw_biases}
    wrong = _wrong_lists(lists, "scale")
    if wrong is not None:
        return wrong
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors or ()):
            wrong = _wrong_weight(f"{name}[{i}]", tensor, qkv, head_dim)
            if wrong is not None:
                return wrong
    return _wrong_eps(eps)


def _wrong_weight(name: str, tensor: torch.Tensor, qkv: torch.Tensor, head_dim: int) -> Exception | None:
    """A weight or a bias, by its name, against qkv."""
    channels = qkv.shape[1]
    if name.startswith("dw_weights"):
        wrong = _wrong_tensor(name, tensor, at_least=4)
        if wrong is not None:
            return wrong
        kernel = tensor.shape[-1]
        if kernel % 2 == 0:
            return ValueError(f"{name}: expected an odd kernel size, got shape {_shape(tensor)}")
        shape: tuple[int, ...] = (channels, 1, kernel, kernel)
    elif name.startswith("pw_weights"):
        shape = (channels, head_dim, 1, 1)
    else:
        shape = (channels,)
    return _wrong_parameter(name, tensor, shape, "qkv", qkv)
