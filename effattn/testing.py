"""What tests, benchmarks and the demo share: operator cases, inputs, tolerances, and model loading.

Nothing here is needed to use effattn.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from effattn.ops import OPERATORS
from effattn.ops._operator import Operator
from effattn.registry import use_backend

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
        dtype: of images; weights are float32.
        order: of images, one of ``ORDERS``.
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
            if argument.is_image:
                tensors.append(laid_out(shape, order, argument.kind == "image", dtype, number))
            else:
                t = make_tensor(*((1, *shape) if len(shape) < 2 else shape), seed=number).reshape(shape)
                tensors.append(t / max(math.prod(shape[1:]), 1) ** 0.5)
        arguments.append(tensors if argument.is_list else None if missing else tensors[0])
    return arguments


#: Relative error (norm) of float32 results that a forward and a gradient may have against float64.
FLOAT32_FORWARD_TOLERANCE = 2e-6
FLOAT32_GRADIENT_TOLERANCE = 1e-5


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the difference, absolute."""
    return torch.linalg.vector_norm(result.double() - truth).item()


def allowed_error(
    plain: torch.Tensor, truth: torch.Tensor, tolerance: float, cancelled: torch.Tensor | None = None
) -> float:
    """What the norm of an error may be: that of the plain formulation in the same dtype, or ``tolerance``.

    Args:
        plain: the plain PyTorch formulation with its upcast to float32; the few per cent on top stand for
            roundings of the same value that fall to different sides.
        truth: the same in float64.
        tolerance: relative to the truth; counts for float32 only, narrower types have but the plain
            formulation to measure up to.
        cancelled: absolute values of what the result is a difference of. Where hardly anything is left of
            it (with one channel, gradients vanish identically), two units in the last place of float32, in
            which every dtype is summed, are rounding noise that no order of summation avoids.
    """
    allowed = 1.02 * error(plain, truth)
    if cancelled is not None:
        allowed = max(allowed, 2 * 2.0**-24 * cancelled.norm().item())
    if plain.dtype == torch.float32:
        allowed = max(allowed, tolerance * torch.linalg.vector_norm(truth).item())
    return allowed + math.ulp(0.0)


def cancelled_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gradients of q and k, which are differences, are differences of: in float64, absolute."""
    relu_q, relu_k, abs_v, abs_grad = q.double().relu(), k.double().relu(), v.double().abs(), grad_out.double().abs()
    grad_numerator = abs_grad / (relu_q @ relu_k.sum(-2).unsqueeze(-1) + eps)
    # Gated like the gradients: a query that is zero everywhere divides by eps, and is dropped.
    grad_q = grad_numerator @ (relu_k.mT @ abs_v).mT * (relu_q > 0)
    grad_k = abs_v @ (relu_q.mT @ grad_numerator).mT * (relu_k > 0)
    return grad_q, grad_k


def reference_with_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """(out, grad_q, grad_k, grad_v) of the reference with all arguments in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    out = OPERATORS["relu_linear_attention"].plain(leaves[0], leaves[1], leaves[2], eps)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))


# --- multi_scale_aggregation, multi_scale_linear_attention ----------------------------------------------------


@dataclass(frozen=True)
class MultiScaleCase:
    """Sizes of a multi-scale call; ``scale`` multiplies qkv."""

    batch: int
    heads: int
    head_dim: int
    height: int
    width: int
    kernels: tuple[int, ...] = (5,)
    biases: bool = False
    scale: float = 1.0

    images = ("qkv",)

    @property
    def channels(self) -> int:
        return 3 * self.heads * self.head_dim

    def inputs(self, dtype: torch.dtype = torch.float32, memory_format: str = "nchw", seed: int = 0) -> dict[str, Any]:
        """Arguments of both functions; weights in float32, of a size that keeps activations where they are."""
        qkv = make_image(
            self.batch, self.channels, self.height, self.width, memory_format, self.scale, 1 + 1000 * seed
        ).to(dtype)
        biases = [make_tensor(1, self.channels, seed=4 + i)[0] * self.scale for i in range(2 * len(self.kernels))]
        return {
            "qkv": qkv,
            "dw_weights": [make_tensor(self.channels, 1, k, k, seed=2) / k for k in self.kernels],
            "pw_weights": [
                make_tensor(self.channels, self.head_dim, 1, 1, seed=3 + i) / self.head_dim**0.5
                for i in range(len(self.kernels))
            ],
            "dw_biases": biases[: len(self.kernels)] if self.biases else [],
            "pw_biases": biases[len(self.kernels) :] if self.biases else [],
        }

    def inputs_away_from_zero(self, dtype: torch.dtype, memory_format: str) -> dict[str, Any]:
        """:meth:`inputs` of the first seed with which no aggregated query or key is rounding noise around zero.

        The relu of such a one opens or shuts by the last bit of any formulation, and its gradient with it.
        """
        for seed in range(100):
            inputs = self.inputs(dtype, memory_format, seed)
            aggregated = self.call(OPERATORS["multi_scale_aggregation"].plain, in_float64(inputs))
            gated = aggregated.reshape(self.batch, -1, 3, self.head_dim, self.height * self.width)[:, :, :2].abs()
            if gated.numel() == 0 or gated[gated > 0].min() > 1e-6 * gated.max():
                return inputs
        raise RuntimeError(f"no inputs of {self} are away from zero")

    def call(self, function: Callable[..., torch.Tensor], inputs: dict[str, Any], **options: Any) -> torch.Tensor:
        return function(*inputs.values(), head_dim=self.head_dim, **options)


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, torch.Tensor) else [w.double() for w in v] for k, v in inputs.items()}


def multi_scale_cancelled_terms(case: MultiScaleCase, inputs: dict[str, Any], eps: float) -> dict[str, torch.Tensor]:
    """``cancelled`` of :func:`allowed_error` for the gradients of multi_scale_linear_attention, by name.

    What cancels in the gradients of the aggregated queries and keys goes, as rounding noise, through the
    convolutions' own backward: independent from element to element, so that squares add up.
    """
    wide = in_float64(inputs)
    aggregated = case.call(OPERATORS["multi_scale_aggregation"].plain, wide)
    heads = aggregated.reshape(case.batch, -1, 3 * case.head_dim, case.height * case.width).mT
    grad_out = make_tensor(case.batch, aggregated.shape[1] // 3, case.height, case.width, seed=9)
    grad_out = grad_out.to(inputs["qkv"].dtype).reshape(case.batch, -1, case.head_dim, case.height * case.width).mT
    q, k, v = heads.chunk(3, dim=-1)
    grad_q, grad_k = cancelled_gradients(q, k, v, grad_out, eps)
    noise = torch.cat([grad_q, grad_k, torch.zeros_like(grad_q)], dim=-1).mT.reshape(aggregated.shape)
    leaves = {k: [v] if isinstance(v, torch.Tensor) else v for k, v in wide.items()}
    squares = {k: [t.square().requires_grad_() for t in v] for k, v in leaves.items()}
    out = case.call(OPERATORS["multi_scale_aggregation"].plain, {**squares, "qkv": squares["qkv"][0]})
    named = gradients_by_name(squares)
    grads = torch.autograd.grad(out, list(named.values()), noise.square())
    return {name: grad.sqrt() for name, grad in zip(named, grads, strict=True)}


def gradients_by_name(leaves: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors under the names that their gradients have in :func:`with_gradients`."""
    return {f"grad {name}" + (f" {i}" if i else ""): t for name, ts in leaves.items() for i, t in enumerate(ts)}


def with_gradients(
    function: Callable[..., torch.Tensor],
    backend: str,
    case: Any,
    inputs: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Output and all gradients of a function, by name; a case's images in ``dtype``, weights as wide or as they are.

    The function is called on ``device``; results are brought back.
    """
    leaves = {
        name: [
            moved(t.detach().to(dtype if name in case.images else torch.promote_types(dtype, t.dtype)), device)
            .detach()
            .requires_grad_()
            for t in ([value] if isinstance(value, torch.Tensor) else value)
        ]
        for name, value in inputs.items()
    }
    arguments = {
        name: leaves[name][0] if isinstance(value, torch.Tensor) else leaves[name] for name, value in inputs.items()
    }
    with use_backend(backend):
        out = case.call(function, arguments, **options)
    flat = gradients_by_name(leaves)
    grad_out = make_tensor(*out.shape, seed=9).to(inputs[case.images[0]].dtype).to(dtype).to(device)
    grads = torch.autograd.grad(out, list(flat.values()), grad_out)
    return {name: t.detach().cpu() for name, t in zip(("out", *flat), (out, *grads), strict=True)}


def moved(t: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device, with its strides, gaps included; itself if it is there."""
    if t.device == torch.device(device) or 0 in t.stride():
        return t.to(device)
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)


def rounding_noise(function: Callable[..., torch.Tensor], case: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """How far each result moves, in float64, if every input is off by as much as float32 may round it, by name.

    What no formulation in float32 can be asked to be better than, for functions in which much cancels: four times the
    largest of three draws, since the norm of a handful of numbers may fall short of its expectation by that.
    """
    generator = torch.Generator().manual_seed(0)

    def off(t: torch.Tensor) -> torch.Tensor:
        return t * (1 + 2.0**-24 * torch.randn(t.shape, generator=generator, dtype=t.dtype))

    wide = in_float64(inputs)
    truth = with_gradients(function, "reference", case, wide, torch.float64)
    noise = dict.fromkeys(truth, 0.0)
    for _ in range(3):
        moved = {k: off(v) if isinstance(v, torch.Tensor) else [off(t) for t in v] for k, v in wide.items()}
        for name, result in with_gradients(function, "reference", case, moved, torch.float64).items():
            noise[name] = max(noise[name], 4 * error(result, truth[name]))
    return noise


def check_multi_scale(
    function: Callable[..., torch.Tensor],
    backend: str,
    case: MultiScaleCase,
    dtype: torch.dtype = torch.float32,
    memory_format: str = "nchw",
    eps: float = 1e-15,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Compares output and gradients of a backend with float64, and returns them by name.

    Allowed is what the plain formulation is off itself, or rounding noise of what cancels in a gradient.
    """
    inputs = case.inputs_away_from_zero(dtype, memory_format)
    options: dict[str, Any] = {}
    cancelled = {}
    if function.__name__ == "multi_scale_linear_attention":
        options, cancelled = {"eps": eps}, multi_scale_cancelled_terms(case, inputs, eps)
    return _check(function, backend, case, inputs, dtype, device, cancelled, {}, **options)


def _check(
    function: Callable[..., torch.Tensor],
    backend: str,
    case: Any,
    inputs: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device | str,
    cancelled: dict[str, torch.Tensor],
    noise: dict[str, float],
    **options: Any,
) -> dict[str, torch.Tensor]:
    truth = with_gradients(function, "reference", case, inputs, torch.float64, **options)
    plain = with_gradients(function, "reference", case, inputs, dtype, **options)
    results = with_gradients(function, backend, case, inputs, dtype, device, **options)
    there = {
        k: moved(v, device) if isinstance(v, torch.Tensor) else [moved(t, device) for t in v] for k, v in inputs.items()
    }
    with use_backend(backend), torch.no_grad():
        assert torch.equal(case.call(function, there, **options).cpu(), results["out"]), (
            "inference differs from training"
        )
    for name, expected in truth.items():
        result = results[name]
        assert result.shape == expected.shape
        assert result.dtype == plain[name].dtype
        tolerance = FLOAT32_FORWARD_TOLERANCE if name == "out" else FLOAT32_GRADIENT_TOLERANCE
        allowed = max(allowed_error(plain[name], expected, tolerance, cancelled.get(name)), noise.get(name, 0.0))
        assert error(result, expected) <= allowed, name
    return results


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
    everything = everything.float() if upcast else everything
    q, k, v = everything.reshape(batch, -1, 3 * dim, height * width).chunk(3, dim=2)
    q, k = q.relu(), k.relu()
    if height * width > dim:
        out = (functional.pad(v, (0, 0, 0, 1), value=1.0) @ k.mT) @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + eps)
    else:
        weights = k.mT @ q
        out = v @ (weights / (weights.sum(dim=2, keepdim=True) + eps))
    return out.reshape(batch, -1, height, width).to(qkv.dtype)


# --- biased_attention, cascaded_group_attention ----------------------------------------------------------------


@dataclass(frozen=True)
class BiasedCase:
    """Sizes of a biased_attention; ``scale`` multiplies q, so that logits grow with it."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    talking: bool = False
    scale: float = 1.0

    images = ("q", "k", "v")

    def inputs(self, dtype: torch.dtype = torch.float32, layout: str = "token_major") -> dict[str, Any]:
        """Arguments by name; the bias and the mixing of heads in float32. Layouts as of :func:`make_tensor`."""
        lead, h = (self.batch, self.heads), self.heads
        mixing = [make_tensor(h, h, seed=5) / h**0.5, make_tensor(1, h, seed=6)[0]]
        mixing += [make_tensor(h, h, seed=7) / h**0.5, make_tensor(1, h, seed=8)[0] / max(self.keys, 1)]
        return {
            "q": make_tensor(*lead, self.queries, self.head_dim, layout=layout, scale=self.scale, seed=1, dtype=dtype),
            "k": make_tensor(*lead, self.keys, self.head_dim, layout=layout, seed=2, dtype=dtype),
            "v": make_tensor(*lead, self.keys, self.value_dim, layout=layout, seed=3, dtype=dtype),
            "bias": make_tensor(h, self.queries, self.keys, seed=4),
            "talking_heads": mixing if self.talking else [],
        }

    def call(self, function: Callable[..., torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
        talking_heads = inputs["talking_heads"] or None
        return function(*(inputs[name] for name in ("q", "k", "v", "bias")), talking_heads=talking_heads)


def softmax_cancelled_terms(case: BiasedCase, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """``cancelled`` of :func:`allowed_error` for biased_attention's gradients through the softmax, by name.

    The gradient of a softmax's input is a difference: weights (grad - sum of weights grad). Where one weight is nearly
    1, nothing is left of it; and that of a bias on all keys vanishes identically.
    """
    wide = in_float64(inputs)
    q, k, scale = wide["q"], wide["k"], case.head_dim**-0.5
    logits = scale * q @ k.mT + wide["bias"]
    grad = make_tensor(case.batch, case.heads, case.queries, case.value_dim, seed=9).to(inputs["q"].dtype).double()
    grad = grad @ wide["v"].mT
    terms = logits
    if case.talking:
        matrix, bias, back, _ = wide["talking_heads"]
        terms = torch.einsum("gh,bhnm->bgnm", matrix, logits) + bias.reshape(-1, 1, 1)
        grad = torch.einsum("gh,bgnm->bhnm", back, grad)
    weights = terms.softmax(dim=-1)
    terms = weights * (grad.abs() + (weights * grad).sum(dim=-1, keepdim=True).abs())
    cancelled = {}
    if case.talking:
        cancelled["grad talking_heads"] = torch.einsum("bgnm,bhnm->gh", terms, logits.abs())
        cancelled["grad talking_heads 1"] = terms.sum(dim=(0, 2, 3))
        terms = torch.einsum("gh,bgnm->bhnm", matrix.abs(), terms)
    return {
        "grad q": scale * terms @ k.abs(),
        "grad k": scale * terms.mT @ q.abs(),
        "grad bias": terms.sum(dim=0),
        **cancelled,
    }


@dataclass(frozen=True)
class CascadeCase:
    """Sizes of a cascaded_group_attention; ``kernels`` has one for each head; ``scale`` multiplies x."""

    batch: int
    channels: int
    key_dim: int
    height: int
    width: int
    window: int | tuple[int, int] | None = None
    kernels: tuple[int, ...] = (5, 5, 5, 5)
    biases: bool = True
    scale: float = 1.0

    images = ("x",)

    def inputs(self, dtype: torch.dtype = torch.float32, memory_format: str = "nchw") -> dict[str, Any]:
        """Arguments by name; weights in float32, of a size that keeps activations where they are."""
        heads = len(self.kernels)
        value_dim = self.channels // heads
        outputs = 2 * self.key_dim + value_dim
        height, width = (
            (max(self.height, 1), max(self.width, 1))
            if self.window is None
            else ((self.window, self.window) if isinstance(self.window, int) else self.window)
        )
        per_head = range(heads)
        return {
            "x": make_image(self.batch, self.channels, self.height, self.width, memory_format, self.scale).to(dtype),
            "qkv_weights": [make_tensor(outputs, value_dim, 1, 1, seed=20 + i) / value_dim**0.5 for i in per_head],
            "qkv_biases": [make_tensor(1, outputs, seed=30 + i)[0] / 4 for i in per_head] if self.biases else [],
            "q_dw_weights": [make_tensor(self.key_dim, 1, k, k, seed=40 + i) / k for i, k in enumerate(self.kernels)],
            "q_dw_biases": [make_tensor(1, self.key_dim, seed=50 + i)[0] / 4 for i in per_head] if self.biases else [],
            "attention_bias": make_tensor(heads, height * width, height * width, seed=60),
        }

    def call(self, function: Callable[..., torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
        return function(*inputs.values(), window_size=self.window)


def check_softmax(
    function: Callable[..., torch.Tensor],
    backend: str,
    case: BiasedCase | CascadeCase,
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """The same for biased_attention and cascaded_group_attention."""
    inputs = case.inputs(dtype) if layout is None else case.inputs(dtype, layout)
    if isinstance(case, BiasedCase):
        return _check(function, backend, case, inputs, dtype, device, softmax_cancelled_terms(case, inputs), {})
    return _check(function, backend, case, inputs, dtype, device, {}, rounding_noise(function, case, inputs))


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
