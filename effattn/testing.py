"""Helpers of tests, benchmarks and the demo: random inputs, import of timm and diffusers, random weights.

Nothing here is needed to use effattn.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from effattn.ops._operator import Operator

#: Memory orders of (..., tokens, channels): channels contiguous, tokens contiguous, and a view in which
#: neither is.
LAYOUTS = ("token_major", "channel_major", "strided")


def make_tensor(
    *sizes: int, layout: str = "token_major", dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """A reproducible normal tensor (..., tokens, channels) in one of ``LAYOUTS``."""
    generator = torch.Generator().manual_seed(seed + sum((i + 1) * size for i, size in enumerate(sizes)))
    *lead, tokens, channels = sizes
    if layout == "token_major":
        values = torch.randn(*lead, tokens, channels, generator=generator)
        return (values * scale).to(dtype)
    if layout == "channel_major":
        values = torch.randn(*lead, channels, tokens, generator=generator)
        return (values * scale).to(dtype).transpose(-1, -2)
    if layout == "strided":
        values = torch.randn(*lead, tokens * 2, channels * 3, generator=generator)
        return (values * scale).to(dtype)[..., ::2, ::3]
    raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def make_image(
    batch: int, channels: int, height: int, width: int, memory_format: str = "nchw", scale: float = 1.0, seed: int = 1
) -> torch.Tensor:
    """A reproducible normal tensor (B, C, H, W): "nchw", "channels_last", a "channel slice" or a "crop" of more.

    Or "transposed", with columns that follow each other, or with rows or columns that are all the same one.
    """
    shape = {
        "channel slice": (batch, 2 * channels, height, width),
        "crop": (batch, channels, height + 1, width + 2),
        "transposed": (batch, channels, width, height),
        "equal rows": (batch, channels, 1, width),
        "equal columns": (batch, channels, height, 1),
    }.get(memory_format, (batch, channels, height, width))
    image = make_tensor(*shape, seed=seed) * scale
    if memory_format == "channels_last":
        return image.to(memory_format=torch.channels_last)
    if memory_format == "channel slice":
        return image[:, :channels]
    if memory_format == "crop":
        return image[:, :, 1:, 1:-1]
    if memory_format == "transposed":
        return image.mT
    if memory_format in ("nchw", "equal rows", "equal columns"):
        return image.expand(batch, channels, height, width)
    raise ValueError(f"memory_format: unknown, got {memory_format!r}")


# --- any operator, from its specification -----------------------------------------------------------------------

#: Memory orders of tensors (..., tokens, channels) and of images.
ORDERS = {"first": ("token_major", "nchw"), "second": ("channel_major", "channels_last"), "gaps": ("strided", "crop")}


def laid_out(
    shape: Sequence[int], order: str, is_image: bool, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """A reproducible normal tensor, or an image (B, C, H, W), in a memory order of ``ORDERS``."""
    layout, memory_format = ORDERS[order]
    if is_image:
        batch, channels, height, width = shape
        return make_image(batch, channels, height, width, memory_format, seed=seed).to(dtype)
    return make_tensor(*shape, layout=layout, dtype=dtype, seed=seed)


def make_arguments(
    operator: Operator,
    case: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    order: str = "first",
    seed: int = 0,
) -> list[Any]:
    """Reproducible arguments of an operator, as its signature has them.

    Images are normal; weights are normal, divided by the root of what each output is a sum of.

    Args:
        operator: whose.
        case: one of its ``cases``, or another with the same names.
        dtype: of activations; weights are float32.
        order: of activations, one of ``ORDERS``.
        seed: other numbers for each.
    """
    arguments: list[Any] = []
    for i, argument in enumerate(operator.signature.arguments):
        if argument.is_option:
            arguments.append(case[argument.name])
            continue
        missing = argument.name in case.get("without", ())
        count = 1 if argument.length is None else 0 if missing else argument.length.value(dict(case))
        tensors = []
        for element in range(count):
            declared = argument.shapes[element % len(argument.shapes)]
            own = {name: case[name][element] for name in declared.names if name in operator.signature.local}
            shape, number = declared.sizes({**case, **own}), 1000 * seed + 10 * i + element
            if argument.is_activation:
                tensors.append(laid_out(shape, order, argument.kind == "image", dtype, number))
            else:
                t = make_tensor(*((1, *shape) if len(shape) < 2 else shape), seed=number).reshape(shape)
                tensors.append(t / max(math.prod(shape[1:]), 1) ** 0.5)
        arguments.append(tensors if argument.is_list else None if missing else tensors[0])
    return arguments


def moved(t: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device, with its strides, gaps included; itself if it is there."""
    if t.device == torch.device(device) or 0 in t.stride():
        return t.to(device)
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)


def official_multi_scale_attention(
    qkv: torch.Tensor,
    dw_weights: Sequence[torch.Tensor],
    pw_weights: Sequence[torch.Tensor],
    dim: int,
    eps: float = 1e-15,
    *,
    upcast: bool,
) -> torch.Tensor:
    """As in the authors' repository: convolutions, concatenation, and the quadratic form where tokens are few.

    Args:
        qkv: (B, 3 * heads * dim, H, W); weights are those of the convolutions of each scale.
        upcast: whether sums are made in float32.
    """
    batch, channels, height, width = qkv.shape
    scales = [qkv]
    for dw, pw in zip(dw_weights, pw_weights, strict=True):
        mixed = functional.conv2d(qkv, dw.to(qkv.dtype), padding=dw.shape[-1] // 2, groups=channels)
        scales.append(functional.conv2d(mixed, pw.to(qkv.dtype), groups=channels // dim))
    everything = torch.cat(scales, dim=1)
    everything = everything.to(torch.promote_types(qkv.dtype, torch.float32)) if upcast else everything
    q, k, v = everything.reshape(batch, -1, 3 * dim, height * width).chunk(3, dim=2)
    q, k = q.relu(), k.relu()
    if height * width > dim:
        out = (functional.pad(v, (0, 0, 0, 1), value=1.0) @ k.mT) @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + eps)
    else:
        weights = k.mT @ q
        out = v @ (weights / (weights.sum(dim=2, keepdim=True) + eps))
    return out.reshape(batch, -1, height, width).to(qkv.dtype)


# --- models ---------------------------------------------------------------------------------------------


def import_timm() -> ModuleType:
    """timm, where torchvision's compiled half does not load as well."""
    return _import_beside_torchvision("timm")


def import_diffusers() -> ModuleType:
    """diffusers, where torchvision's compiled half does not load as well."""
    diffusers = _import_beside_torchvision("diffusers")
    # Its names load what they stand for when they are asked for; torchvision comes with these.
    _import_beside_torchvision("diffusers.models.autoencoders.autoencoder_dc")
    return diffusers


def _import_beside_torchvision(name: str) -> ModuleType:
    """The libraries need torchvision's Python half only, and that half needs the names of its compiled operators to
    exist. Where they do not, they are declared, without an implementation, before the import.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (name, "torchvision"):
            raise
        _declare_torchvision_operators(name)
        return importlib.import_module(name)


_declared: list[torch.library.Library] = []  # a Library withdraws its names when it is collected


def _declare_torchvision_operators(importing: str) -> None:
    import re
    import sys
    from importlib.metadata import files

    for name in [name for name in sys.modules if name.split(".")[0] in (importing.split(".")[0], "torchvision")]:
        del sys.modules[name]
    source = next(f for f in files("torchvision") or () if f.name == "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in {"nms", "qnms", *re.findall(r'register_meta\("(\w+)"', source)}:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    _declared.append(library)


def randomise_batch_norm(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every BatchNorm statistics and parameters that would show an error in folding them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for tensor, low, high in (
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.3, 0.3),
                ):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


def randomise_what_starts_at_zero(model: torch.nn.Module, seed: int = 0) -> None:
    """Tables of biases, scales of residual branches: untrained, they would hide an error in what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("attention_biases", "gamma")):
            with torch.no_grad():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.3)
