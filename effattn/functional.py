"""The functions that users call: they explain wrong arguments and hand over to the operators."""

from __future__ import annotations

import math
from numbers import Real

import torch

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
    if torch.compiler.is_compiling():
        q, k, v = _promoted_by_autocast(q, k, v)
        _raise_if(_wrong_arguments(q, k, v, eps))
        return _relu_linear_attention.relu_linear_attention(q, k, v, eps)
    try:
        if not (q.dtype == k.dtype == v.dtype):
            q, k, v = _promoted_by_autocast(q, k, v)
        return _relu_linear_attention.relu_linear_attention(q, k, v, eps)
    except Exception:
        # Operators check everything themselves, so a good call pays for no check in Python; a bad
        # one is looked at here, to say it in terms of this function.
        _raise_if(_wrong_arguments(q, k, v, eps))
        raise


def _raise_if(error: Exception | None) -> None:
    if error is not None:
        raise error from None


def _promoted_by_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The arguments in their widest dtype if autocast is on; unchanged where they agree already."""
    if all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors) and torch.is_autocast_enabled(
        tensors[0].device.type
    ):
        widest = tensors[0].dtype
        for t in tensors[1:]:
            widest = torch.promote_types(widest, t.dtype)
        return tuple(t.to(widest) for t in tensors)
    return tensors


def _wrong_tensor(name: str, tensor: object) -> Exception | None:
    if not isinstance(tensor, torch.Tensor):
        return TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        return TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.dtype not in _FLOATING:
        return TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.dim() < 2:
        return ValueError(f"{name}: expected at least 2 dimensions (..., tokens, channels), got shape {_shape(tensor)}")
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
    if not isinstance(eps, Real) or isinstance(eps, bool):
        return TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        return ValueError(f"eps: expected a finite number >= 0, got {eps}")
    return None
