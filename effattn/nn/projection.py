"""1x1 convolutions around the operators: as matrix products, with the BatchNorm behind them folded in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from effattn._library import _C
from effattn._tracing import is_exporting_to_onnx, needs_gradients
from effattn.nn.fold_cache import HOOKS, Folds, cached
from effattn.nn.origin import is_genuine

# torch's matrix products are MKL's, which leaves an AMD processor half of its vectors; its convolutions are oneDNN's.
_PRODUCTS_ARE_SLOW = _C is not None and _C.is_amd() and torch.backends.mkl.is_available()


def is_autocast(x: torch.Tensor) -> bool:
    """The meta device knows no autocast and refuses to be asked."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


# Elements times channels of what one operator with float32 weights is faster for than calls of narrow products.
_NARROW_AT_ONCE = 2**23


def at_once_under_autocast(x: torch.Tensor) -> bool:
    """Whether a module's inference as one operator on ``x`` takes less time than what autocast makes of its parts.

    The operator multiplies in float32, the parts in narrow products, which are faster but have to be called one by one
    and round in between. True without autocast.
    """
    return not is_autocast(x) or x.numel() * x.shape[1] <= _NARROW_AT_ONCE


def dtype_of_call(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a convolution of ``x`` is computed: autocast's, or that of ``x``."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) and x.dtype != torch.float64 else x.dtype


def cast_by_autocast(x: torch.Tensor) -> torch.Tensor:
    """In the dtype that autocast gives the arguments of a convolution."""
    dtype = dtype_of_call(x)
    return x if x.dtype == dtype else x.to(dtype)


def is_overridden(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: it has hooks, or methods of its own."""
    own = module.__dict__
    return any(own[name] for name in HOOKS) or "forward" in own or "_conv_forward" in own


def is_plain(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a module's weights can be used in place of calling it: no subclass, and no hooks."""
    return type(module) is cls and not is_overridden(module)


def is_dense(weight: torch.Tensor) -> bool:
    """Not one of the subclasses that quantise: those are used by the layers that have them."""
    if torch.compiler.is_compiling():  # fakes are subclasses too
        return not is_traceable_wrapper_subclass(weight)
    return type(weight) in (nn.Parameter, torch.Tensor)


# Whose own forward calls its parts one after the other: timm's, those of effattn.nn, diffusers'.
_IN_ORDER = ("ConvNorm", "_ConvNorm", "SanaMultiscaleAttentionProjection")


def calls_in_order(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether calling a module is calling its parts one after the other, and it has no hooks."""
    if module is None or is_overridden(module):
        return False
    cls = type(module)
    return cls.forward is nn.Sequential.forward or (cls.__name__ in _IN_ORDER and is_genuine(cls))


def is_pointwise(conv: nn.Conv2d, groups: int = 1) -> bool:
    """Whether a convolution is a matrix product of channels, or of so many groups of them."""
    return (
        conv.kernel_size == conv.stride == conv.dilation == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
        and conv.groups == groups
    )


def is_depthwise(conv: nn.Conv2d, stride: int = 1) -> bool:
    """Whether a convolution takes every channel alone, with an odd square kernel that keeps the size, or divides it."""
    side = conv.kernel_size[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size == (side, side)
        and side % 2 == 1
        and conv.stride == (stride, stride)
        and conv.dilation == (1, 1)
        and conv.padding in ((side // 2, side // 2), "same")
        and conv.padding_mode == "zeros"
    )


_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision's and detectron2's; timm's
_STATISTICS = {"weight", "bias", "running_mean", "running_var"}


def _is_frozen_batch_norm(norm: nn.Module) -> bool:
    """Whether a norm is an affine map of its buffers in every mode; timm's may have an activation behind it."""
    buffers = {name for name, buffer in norm._buffers.items() if buffer is not None}
    return (
        type(norm).__name__ in _FROZEN
        and is_genuine(type(norm))
        and not is_overridden(norm)
        and buffers - {"num_batches_tracked"} == _STATISTICS
        and not norm._parameters
        and isinstance(norm.__dict__.get("eps"), float)
        and all(is_plain(part, nn.Identity) for part in norm._modules.values())
    )


def is_batch_norm(norm: nn.Module | None) -> bool:
    """Whether a norm is an affine map in evaluation, whatever it is in training: BatchNorm, or what is left of it."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)
    return norm is None or any(is_plain(norm, kind) for kind in kinds) or _is_frozen_batch_norm(norm)


def is_affine(norm: nn.Module | None) -> bool:
    """Whether a norm is, as it stands, an affine map of numbers that do not depend on the input."""
    if not is_batch_norm(norm):
        return False
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        return not norm.training and norm.running_mean is not None
    return True


def can_fold(norm: nn.Module | None) -> bool:
    """Whether the norm is an affine map, and nobody needs gradients."""
    return not needs_gradients() and is_affine(norm) and not is_exporting_to_onnx()


def folded_pair(part: nn.Module | None, in_front: int = 0) -> tuple[nn.Conv2d, nn.Module | None] | None:
    """The convolution at the end of a part and the norm behind it, or None where they are no affine map together.

    ``in_front``: how many modules stand in front of them (an activation), which must still be called. With gradients,
    :func:`fold_batch_norm` is one more differentiable step.
    """
    if is_exporting_to_onnx():  # runtimes fold them themselves, and know no weights but constants
        return None
    pair = convolution_and_norm(part, in_front)
    return pair if pair is not None and is_affine(pair[1]) else None


def convolution_and_norm(part: nn.Module | None, in_front: int = 0) -> tuple[nn.Conv2d, nn.Module | None] | None:
    """The last two of a part, where their tensors can be used in place of calling them.

    The norm is None where it is in the convolution already (``fuse()`` of timm and of the official repositories puts a
    convolution in the part's place, torch's fusion an identity in the norm's).
    """
    if is_plain(part, nn.Conv2d):
        parts: list[Any] = [part]
    elif calls_in_order(part):
        parts = list(part._modules.values())
    else:
        return None
    conv, *norms = parts[in_front:] or [None]
    if len(norms) > 1 or not is_plain(conv, nn.Conv2d) or conv.padding_mode != "zeros" or not is_dense(conv.weight):
        return None
    norm = norms[0] if norms else None
    if not is_batch_norm(norm):
        return None
    return conv, None if type(norm) is nn.Identity else norm


def fold_batch_norm(
    projection: nn.Conv2d | nn.Linear, norm: nn.Module | None, *, rounded: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one projection that does what both do; differentiable.

    Args:
        norm: a norm that :func:`is_affine`.
        rounded: to the projection's dtype; else they are of float32 at least.
    """
    at_least = torch.promote_types(projection.weight.dtype, torch.float32)
    dtype = projection.weight.dtype if rounded else at_least
    if norm is None or type(norm) is nn.Identity:
        weight, bias = projection.weight, projection.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if not needs_gradients():  # a view of a parameter that is kept would keep torch from swapping the parameter
            weight, bias = weight.detach(), bias.detach()
        return weight.to(dtype), bias.to(dtype)
    tensors: Any = norm  # a BatchNorm, or what has its tensors
    scale = (tensors.running_var.to(at_least) + tensors.eps).rsqrt()
    if tensors.weight is not None:
        scale = scale * tensors.weight.to(at_least)
    shift = -tensors.running_mean.to(at_least) * scale
    if projection.bias is not None:
        shift = shift + projection.bias.to(at_least) * scale
    if tensors.bias is not None:
        shift = shift + tensors.bias.to(at_least)
    weight = projection.weight.to(at_least) * scale.reshape(-1, *(1 for _ in projection.weight.shape[1:]))
    return weight.to(dtype), shift.to(dtype)


def with_weight_in(dtype: torch.dtype, folded: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias as :func:`folded_convolution` uses them in a call of ``dtype``. Kept, they spare it the cast."""
    weight, bias = folded
    return weight.to(dtype), bias


def kept_weight(folds: Folds | None, name: str, x: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The weight that ``make`` returns, for a product with ``x``; where ``folds`` keeps it, cast as autocast would."""
    dtype = dtype_of_call(x) if folds is not None and is_autocast(x) else None
    weight: torch.Tensor = cached(folds, (name, dtype), lambda: make() if dtype is None else make().to(dtype))
    return weight


def _is_on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def _is_slow_as_product(x: torch.Tensor) -> bool:
    """Of narrow types both are oneDNN's; as convolutions they round as the stock module's do."""
    return _PRODUCTS_ARE_SLOW and x.dtype != torch.float64 and _is_on_cpu(x) and x.numel() > 0


def pointwise_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 1x1 convolution as whichever is fastest: a matrix product, but for training on batches in NCHW, and on AMD.

    Args:
        x: (B, C, H, W).
        weight: (C_out, C, 1, 1) of a convolution, or (C_out, C) of a linear layer.
        bias: (C_out,), or None.

    Returns:
        (B, C_out, H, W), of x's memory format.
    """
    if (not torch.compiler.is_compiling() and torch._C._is_tracing()) or is_exporting_to_onnx():
        # As one node, and for every batch size.
        return functional.conv2d(x, weight if weight.dim() == 4 else weight.unsqueeze(-1).unsqueeze(-1), bias)
    batch, channels, height, width = x.shape
    matrix = weight.flatten(1)
    if torch._C._are_functorch_transforms_active() or _is_slow_as_product(x):
        return functional.conv2d(x, matrix.unsqueeze(-1).unsqueeze(-1), bias)
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return functional.linear(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)
    grad = torch.is_grad_enabled()
    if not grad and forward_ad._current_level < 0:
        matrix = matrix.detach()  # of one that requires grad, matmul copies the batch to and fro, gradients or not
    if x.numel() > 0 and (not x.is_contiguous() or (batch != 1 and grad)):
        return functional.conv2d(x, matrix.unsqueeze(-1).unsqueeze(-1), bias)
    if batch == 1:
        tokens = x.reshape(channels, height * width)
        out = torch.mm(matrix, tokens) if bias is None else torch.addmm(bias.unsqueeze(-1), matrix, tokens)
    else:
        tokens = x.reshape(batch, channels, height * width)
        out = torch.matmul(matrix, tokens)
        if bias is not None:
            out = out + bias.unsqueeze(-1) if grad else out.add_(bias.unsqueeze(-1))
    return out.reshape(batch, weight.shape[0], height, width)


def folded_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, like: nn.Conv2d | None = None
) -> torch.Tensor:
    """A convolution with BatchNorm folded in, in the dtype of x or of autocast, whose bias is not rounded to it.

    BatchNorm adds its bias in float32. A folded one may be most of what a channel holds: rounded before it is added, it
    puts the error of one more rounding on every pixel.

    Args:
        x: (B, C, H, W).
        weight: (C_out, C / groups, k, k), or (C_out, C) of a 1x1 convolution; that of :func:`with_weight_in` is
            taken as it is.
        bias: (C_out,); at least as wide as x.
        like: has the stride, padding, dilation and groups; None: of a 1x1 convolution.

    Returns:
        (B, C_out, H', W'), of x's memory format.
    """
    x = cast_by_autocast(x)
    if torch.promote_types(bias.dtype, x.dtype) == x.dtype or x.numel() == 0:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if like is None:
            return pointwise_convolution(x, weight, bias)
        return functional.conv2d(x, weight, bias, like.stride, like.padding, like.dilation, like.groups)
    weight = weight.to(x.dtype)
    if not _is_on_cpu(x) and _is_plain_inference():
        # Convolutions in NCHW may convert the image on GPUs, products do not; their pass behind it adds in float32.
        out = (
            pointwise_convolution(x, weight, None)
            if like is None
            else functional.conv2d(x, weight, None, like.stride, like.padding, like.dilation, like.groups)
        )
        return out.add_(bias.unsqueeze(-1).unsqueeze(-1))
    weight = weight if weight.dim() == 4 else weight.unsqueeze(-1).unsqueeze(-1)
    stride, padding, dilation, groups = (
        ((1, 1), (0, 0), (1, 1), 1) if like is None else (like.stride, like.padding, like.dilation, like.groups)
    )
    if not isinstance(padding, str) and _is_eager_inference(x) and _adds_wide_bias(x.dtype):
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    out = functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    if _is_transformed():  # transforms know no batch_norm of two dtypes
        return (out + bias.unsqueeze(-1).unsqueeze(-1)).to(x.dtype)
    # BatchNorm with nothing but a bias adds in float32 and rounds in one pass.
    mean, variance = torch.zeros_like(bias), torch.ones_like(bias)
    return functional.batch_norm(out, mean, variance, torch.ones_like(bias), bias, eps=0.0)


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_plain_inference() -> bool:
    """Whether nobody differentiates, transforms or compiles a call."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed())


def _is_eager_inference(x: torch.Tensor) -> bool:
    """Whether a call on the CPU is no more than its result: no mode looks at its operations either."""
    return _is_on_cpu(x) and _is_plain_inference() and torch._C._len_torch_dispatch_stack() == 0


@cache
def _adds_wide_bias(dtype: torch.dtype) -> bool:
    """Whether oneDNN has convolutions of a narrow dtype on this processor, and adds a float32 bias before it rounds.

    conv2d takes none of another dtype than the image's.
    """
    one, step = torch.ones(1, 1, 1, 1, dtype=dtype), torch.finfo(dtype).eps
    # 1 and a bit more than half a step is the next number; with the bias rounded it is a tie, which goes to 1.
    bias = torch.tensor([step / 2 * (1 + step / 4)])
    try:
        out = torch.mkldnn_convolution(one, one, bias, (0, 0), (1, 1), (1, 1), 1)
    except (RuntimeError, AttributeError):
        return False
    return out.dtype == dtype and out.item() == 1 + step
