"""relu_linear_attention as torch sees it: fake kernels, autograd, and the choice of the backend.

Two operators compute the same: ``effattn::relu_linear_attention`` for inference carries no autograd
formula, because a formula in Python triples the cost of a call that needs none;
``effattn::relu_linear_attention_forward`` also returns the sums that the backward needs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from effattn import _library, registry
from effattn._tracing import untraced
from effattn.backends import Fused, is_small_call, reference, triton
from effattn.backends._memory import empty_in_order_of
from effattn.ops import _plain

NAME = "relu_linear_attention"


def relu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """Calls the chosen backend; arguments are checked by :mod:`effattn.functional`."""
    is_compiling = torch.compiler.is_compiling()
    is_tracing = not is_compiling and torch._C._is_tracing()
    if is_tracing:
        with untraced():
            function = registry.find(NAME, q.device, q.dtype, (q.shape[-1], v.shape[-1], q.dim())).functions[NAME]
            if not isinstance(function, Fused):
                _check(q, k, v, eps)
    else:
        sizes = (q.shape[-1], v.shape[-1], q.dim())
        is_traced = is_compiling or type(sizes[0]) is not int or type(sizes[1]) is not int
        find = registry.find if is_traced else registry.choose
        function = find(NAME, q.device, q.dtype, sizes, is_small=is_small_call((q, k, v))).functions[NAME]
        if not isinstance(function, Fused):
            _check(q, k, v, eps)  # plain operations would broadcast instead of complaining
    if not isinstance(function, Fused):
        return function(q, k, v, eps)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        # torch.func and forward mode differentiate through plain operations, never through a kernel.
        return reference.relu_linear_attention(q, k, v, eps)
    # A trace holds what can be differentiated, however it is made: torch checks it by one without gradients.
    if is_tracing or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return function.forward(q, k, v, eps)[0]
    return function.inference(q, k, v, eps)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> None:
    """Raises RuntimeError where the compiled operator would; effattn.functional says it in better words."""
    for t in (q, k, v):
        torch._check(t.layout == torch.strided, lambda: "q, k and v must be dense")
        torch._check(t.device == q.device, lambda: "q, k and v must be on one device")
        torch._check(t.dtype == q.dtype, lambda: "q, k and v must have one dtype")
        torch._check(t.dim() == q.dim() and t.dim() >= 2, lambda: "q, k and v must have one rank >= 2")
        torch._check(t.shape[:-2] == q.shape[:-2], lambda: "q, k and v must have the same leading sizes")
    torch._check(k.shape[-1] == q.shape[-1], lambda: "k must have the head_dim of q")
    torch._check(v.shape[-2] == k.shape[-2], lambda: "v must have as many tokens as k")
    torch._check(0 <= eps < math.inf, lambda: "eps must be a finite number >= 0")


def _fake_inference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    _check(q, k, v, eps)
    return empty_in_order_of(q, (*q.shape[:-1], v.shape[-1]))


def _fake_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    out = _fake_inference(q, k, v, eps)
    return out, q.new_empty(_sums_shape(q, v), dtype=torch.float32)


def _sums_shape(q: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    return (*q.shape[:-2], v.shape[-1] + 1, q.shape[-1])


def _check_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor, eps: float
) -> None:
    _check(q, k, v, eps)
    for given, shape in ((grad_out, (*q.shape[:-1], v.shape[-1])), (sums, _sums_shape(q, v))):
        torch._check(given.device == q.device, lambda: "grad_out and sums must be on q's device")
        torch._check(given.shape == shape, lambda: "grad_out and sums must have the shapes of the forward's results")
    torch._check(grad_out.dtype == q.dtype, lambda: "grad_out must have q's dtype")
    torch._check(sums.dtype == torch.float32, lambda: "sums must be float32")


def _fake_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    _check_backward(grad_out, q, k, v, sums, eps)
    return tuple(empty_in_order_of(like, like.shape) for like in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ctx.eps = inputs
    ctx.save_for_backward(q, k, v, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(namespace: str, ctx: Any, grad_out: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None:
        return None, None, None, None
    q, k, v, sums = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate this again
        return *_differentiable_backward(grad_out, q, k, v, ctx.eps), None
    backward = getattr(torch.ops, namespace).relu_linear_attention_backward
    return *backward(grad_out, q, k, v, sums, ctx.eps), None


def _differentiable_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients as plain operations, which have derivatives of every order; in float32 under autocast too."""
    with reference.without_autocast(q.device):
        at_least = torch.promote_types(q.dtype, torch.float32)
        grad = grad_out.to(at_least)
        a, b, c = q.to(at_least).relu(), k.to(at_least).relu(), v.to(at_least)
        kv, k_sum = b.mT @ c, b.sum(-2, keepdim=True)
        denominator = (a * k_sum).sum(-1, keepdim=True) + eps
        grad_numerator = grad / denominator
        grad_denominator = -(grad_numerator * ((a @ kv) / denominator)).sum(-1, keepdim=True)
        grad_kv = a.mT @ grad_numerator
        grad_a = grad_numerator @ kv.mT + grad_denominator * k_sum
        grad_b = c @ grad_kv.mT + (a * grad_denominator).sum(-2, keepdim=True)
        return (
            torch.where(a <= 0, 0.0, grad_a).to(q.dtype),
            torch.where(b <= 0, 0.0, grad_b).to(k.dtype),
            (b @ grad_kv).to(v.dtype),
        )


def _register(namespace: str) -> None:
    torch.library.register_fake(f"{namespace}::{NAME}", _fake_inference)
    torch.library.register_fake(f"{namespace}::{NAME}_forward", _fake_forward)
    torch.library.register_fake(f"{namespace}::{NAME}_backward", _fake_backward)
    formula = partial(_backward, namespace)
    torch.library.register_autograd(f"{namespace}::{NAME}_forward", formula, setup_context=_save)
    plain = reference.relu_linear_attention
    _plain.register(f"{namespace}::{NAME}", plain)
    _plain.register(f"{namespace}::{NAME}_forward", plain, outputs=2)
    _plain.register_backward(
        f"{namespace}::{NAME}_backward", plain, lambda grad, q, k, v, _, eps: (grad, (q, k, v, eps))
    )


def _check_for_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> None:
    _check(q, k, v, eps)
    triton.check_sizes(NAME, (q.shape[-1], v.shape[-1], q.dim()))


def _check_backward_for_triton(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor, eps: float
) -> None:
    _check_backward(grad_out, q, k, v, sums, eps)
    _check_for_triton(q, k, v, eps)


if _library.error is None:
    _register("effattn")
if triton.register(NAME, _check_for_triton, _check_backward_for_triton):
    _register(triton.NAMESPACE)
