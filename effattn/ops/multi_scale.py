"""multi_scale_aggregation and multi_scale_linear_attention as torch sees them.

As for relu_linear_attention there is an operator for inference and one, ``*_forward``, with an autograd
formula. Operators take weights in float32 only, whatever the dtype of qkv: they are small, and under autocast
they are float32 already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from effattn import _library, registry
from effattn.backends import Fused, reference
from effattn.ops._memory import empty_in_order_of

Tensors = Sequence[torch.Tensor]

AGGREGATION = "multi_scale_aggregation"
ATTENTION = "multi_scale_linear_attention"


def multi_scale_aggregation(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int
) -> torch.Tensor:
    """Calls the chosen backend; arguments are checked by :mod:`effattn.functional`."""
    return _call(AGGREGATION, qkv, (dw, pw, dw_biases, pw_biases), (head_dim,))


def multi_scale_linear_attention(
    qkv: torch.Tensor,
    dw: Tensors,
    pw: Tensors,
    dw_biases: Tensors,
    pw_biases: Tensors,
    head_dim: int,
    eps: float,
) -> torch.Tensor:
    """Calls the chosen backend; arguments are checked by :mod:`effattn.functional`."""
    return _call(ATTENTION, qkv, (dw, pw, dw_biases, pw_biases), (head_dim, eps))


def _call(name: str, qkv: torch.Tensor, weights: tuple[Tensors, ...], options: tuple[Any, ...]) -> torch.Tensor:
    compiling = torch.compiler.is_compiling()
    function = (registry.find if compiling else registry.choose)(name, qkv.device, qkv.dtype).functions[name]
    if not isinstance(function, Fused):  # the reference
        _check(qkv, weights, *options)
        return function(qkv, *weights, *options)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return reference.FUNCTIONS[name](qkv, *weights, *options)
    if qkv.dtype != torch.float32:
        weights = tuple([w.float() if w.dtype == qkv.dtype else w for w in part] for part in weights)
    if torch.is_grad_enabled() and (qkv.requires_grad or any(w.requires_grad for part in weights for w in part)):
        out = function.forward(qkv, *weights, *options)
        return out if isinstance(out, torch.Tensor) else out[0]
    return function.inference(qkv, *weights, *options)


def _check(qkv: torch.Tensor, weights: tuple[Tensors, ...], head_dim: int, eps: float = 0.0) -> None:
    """Raises RuntimeError where the compiled operators would; effattn.functional says it in better words."""
    dw, pw, dw_biases, pw_biases = weights
    torch._check(qkv.dim() == 4, lambda: "qkv must have 4 dimensions (B, C, H, W)")
    torch._check(head_dim > 0, lambda: "head_dim must be positive")
    for weight in (*dw, *pw, *dw_biases, *pw_biases):
        torch._check(weight.device == qkv.device, lambda: "weights must be on qkv's device")
        torch._check(weight.dtype in (qkv.dtype, torch.float32), lambda: "weights must be float32 or of qkv's dtype")
    channels = qkv.shape[1]
    torch._check(channels % (3 * head_dim) == 0, lambda: "qkv must have a multiple of 3 * head_dim channels")
    torch._check(len(pw) == len(dw), lambda: "pw_weights must have as many tensors as dw_weights")
    for biases in (dw_biases, pw_biases):
        torch._check(len(biases) in (0, len(dw)), lambda: "biases must be empty or have a tensor a scale")
        for bias in biases:
            torch._check(bias.shape == (channels,), lambda: "biases must have shape (C,)")
    for depthwise, pointwise in zip(dw, pw, strict=True):
        kernel = depthwise.shape[-1]
        torch._check(
            depthwise.shape == (channels, 1, kernel, kernel), lambda: "dw_weights must have shape (C, 1, k, k)"
        )
        torch._check(kernel % 2 == 1, lambda: "dw_weights must have an odd k")
        torch._check(
            pointwise.shape == (channels, head_dim, 1, 1), lambda: "pw_weights must have shape (C, head_dim, 1, 1)"
        )
    torch._check(0 <= eps < math.inf, lambda: "eps must be a finite number >= 0")


# --- fake kernels ---------------------------------------------------------------------------------------


def _fake_aggregation(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int
) -> torch.Tensor:
    _check(qkv, (dw, pw, dw_biases, pw_biases), head_dim)
    return empty_in_order_of(qkv, (qkv.shape[0], (1 + len(dw)) * qkv.shape[1], *qkv.shape[2:]))


def fake_attention(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int, eps: float
) -> torch.Tensor:
    _check(qkv, (dw, pw, dw_biases, pw_biases), head_dim, eps)
    return empty_in_order_of(qkv, (qkv.shape[0], (1 + len(dw)) * (qkv.shape[1] // 3), *qkv.shape[2:]))


def _fake_attention_forward(
    qkv: torch.Tensor, dw: Tensors, pw: Tensors, dw_biases: Tensors, pw_biases: Tensors, head_dim: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = fake_attention(qkv, dw, pw, dw_biases, pw_biases, head_dim, eps)
    heads = (1 + len(dw)) * (qkv.shape[1] // (3 * head_dim))
    return out, qkv.new_empty((qkv.shape[0], heads, head_dim + 1, head_dim), dtype=torch.float32)


def _fake_gradients(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    dw: Tensors,
    pw: Tensors,
    dw_biases: Tensors,
    pw_biases: Tensors,
    *_: Any,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    like = [[w.new_empty(w.shape) for w in part] for part in (dw, pw, dw_biases, pw_biases)]
    return empty_in_order_of(qkv, qkv.shape), like[0], like[1], like[2], like[3]


# --- autograd -------------------------------------------------------------------------------------------


def _save(name: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, *weights = inputs[:5]
    ctx.lengths = [len(part) for part in weights]
    ctx.options = inputs[5:]
    extra: tuple[torch.Tensor, ...] = ()
    if name == ATTENTION:
        extra = (output[1],)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *(w for part in weights for w in part), *extra)


def _backward(name: str, ctx: Any, grad_out: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    nothing: tuple[Any, ...] = (None, *([None] * n for n in ctx.lengths), *(None for _ in ctx.options))
    if grad_out is None:
        return nothing
    qkv, *rest = ctx.saved_tensors
    weights = []
    for n in ctx.lengths:
        weights.append(rest[:n])
        rest = rest[n:]
    if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate this again
        return *_differentiable_backward(name, grad_out, qkv, weights, ctx.options), *(None for _ in ctx.options)
    backward = getattr(torch.ops.effattn, f"{name}_backward")
    return *backward(grad_out, qkv, *weights, *rest, *ctx.options), *(None for _ in ctx.options)


def _differentiable_backward(
    name: str, grad_out: torch.Tensor, qkv: torch.Tensor, weights: list[list[torch.Tensor]], options: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The gradients by way of the reference, which has derivatives of every order."""
    inputs = [t for t in (qkv, *(w for part in weights for w in part)) if t.requires_grad]
    out = reference.FUNCTIONS[name](qkv, *weights, *options)
    grads = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True))
    found = [next(grads) if t.requires_grad else None for t in (qkv, *(w for part in weights for w in part))]
    parts: list[Any] = [found.pop(0)]
    for part in weights:
        parts.append(found[: len(part)])
        found = found[len(part) :]
    return tuple(parts)


def _register(name: str, fake: Callable[..., Any], fake_forward: Callable[..., Any]) -> None:
    torch.library.register_fake(f"effattn::{name}", fake)
    torch.library.register_fake(f"effattn::{name}_forward", fake_forward)
    torch.library.register_fake(f"effattn::{name}_backward", _fake_gradients)
    torch.library.register_autograd(
        f"effattn::{name}_forward",
        lambda ctx, *grads: _backward(name, ctx, *grads),
        setup_context=lambda ctx, inputs, output: _save(name, ctx, inputs, output),
    )


if _library.error is None:
    _register(AGGREGATION, _fake_aggregation, _fake_aggregation)
    _register(ATTENTION, fake_attention, _fake_attention_forward)
