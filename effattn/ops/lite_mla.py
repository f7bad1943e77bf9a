"""The operator behind LiteMLA's inference: fake kernel and call. It has no autograd formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from effattn import _library, registry
from effattn.backends import Backend, Fused, reference
from effattn.ops._memory import empty_in_order_of
from effattn.ops.multi_scale import fake_attention

Tensors = Sequence[torch.Tensor]
NAME = "lite_mla"


def serves(x: torch.Tensor) -> bool:
    """Whether a kernel takes ``x``; a plain formulation is no faster here than the parts one by one."""
    return _backend(x) is not reference.BACKEND and not torch._C._are_functorch_transforms_active()


def _backend(x: torch.Tensor) -> Backend:
    return (registry.find if torch.compiler.is_compiling() else registry.choose)(NAME, x.device, x.dtype)


def lite_mla(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    dw: Tensors,
    pw: Tensors,
    dw_biases: Tensors,
    pw_biases: Tensors,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    head_dim: int,
    eps: float,
) -> torch.Tensor:
    """(B, C, H, W) -> (B, C_out, H, W): 1x1 convolution, multi_scale_linear_attention, 1x1 convolution.

    Args:
        qkv_weight: (3 * heads * head_dim, C), float32 like all weights here; qkv_bias of as many outputs, or None.
        dw, pw, dw_biases, pw_biases, head_dim, eps: as in multi_scale_linear_attention.
        proj_weight: (C_out, (1 + S) * heads * head_dim); proj_bias of as many outputs, or None.
    """
    arguments = (x, qkv_weight, qkv_bias, dw, pw, dw_biases, pw_biases, proj_weight, proj_bias, head_dim, eps)
    backend = reference.BACKEND if forward_ad._current_level >= 0 else _backend(x)
    function = backend.functions[NAME]
    assert not isinstance(function, Fused)
    return function(*arguments)


def _fake(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    dw: Tensors,
    pw: Tensors,
    dw_biases: Tensors,
    pw_biases: Tensors,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    head_dim: int,
    eps: float,
) -> torch.Tensor:
    torch._check(x.dim() == 4, lambda: "x must have 4 dimensions (B, C, H, W)")
    for weight, bias in ((qkv_weight, qkv_bias), (proj_weight, proj_bias)):
        torch._check(weight.dim() == 2, lambda: "qkv_weight and proj_weight must have 2 dimensions (outputs, inputs)")
        torch._check(bias is None or bias.shape == weight.shape[:1], lambda: "biases must have shape (outputs,)")
    torch._check(qkv_weight.shape[1] == x.shape[1], lambda: "qkv_weight must have shape (outputs, C)")
    qkv = x.new_empty((x.shape[0], qkv_weight.shape[0], *x.shape[2:]))
    attended = fake_attention(qkv, dw, pw, dw_biases, pw_biases, head_dim, eps)
    torch._check(
        proj_weight.shape[1] == attended.shape[1],
        lambda: "proj_weight must have shape (C_out, (1 + S) * heads * head_dim)",
    )
    return empty_in_order_of(x, (x.shape[0], proj_weight.shape[0], *x.shape[2:]))


if _library.error is None:
    torch.library.register_fake(f"effattn::{NAME}", _fake)
