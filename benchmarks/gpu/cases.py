"""What is measured on a card: the operators in the shapes of real models, from one image to 256.

Images are in a narrow type, weights in float32, as under autocast.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

import effattn
from benchmarks import linear_attention as rla
from benchmarks.floor import Work
from benchmarks.gpu import names
from benchmarks.gpu.runner import STOCK, Arguments, GpuCase
from effattn import testing
from effattn.ops import OPERATORS
from effattn.ops._plain import mix_heads
from effattn.testing import ATTENTION_CASES, AttentionCase, BiasedCase, CascadeCase, MultiScaleCase

NARROW = torch.bfloat16
BATCHES = (1, 16, 256)
SANA = AttentionCase("Sana N4096 C1152 H36, batch 16", 16, 36, 32, 64, 64)


def _work(flops: float, inputs: float, outputs: float, training: bool, dtype: torch.dtype) -> Work:
    """Elements that are read and written; a training step also reads the output's gradient and writes the inputs'."""
    elements = 2 * (inputs + outputs) + inputs if training else inputs + outputs
    return Work(bytes=int(elements * dtype.itemsize), flops=int(flops * (3 if training else 1)), dtype=dtype)


# --- relu_linear_attention ------------------------------------------------------------------------------


def _attention(case: AttentionCase, dtype: torch.dtype, training: bool, token_major: bool = False) -> GpuCase:
    """Channel-major, as convolutions leave it; or as diffusers has it, heads of (batch, tokens, channels)."""

    def make() -> Arguments:
        if token_major:
            rows = (case.batch, case.tokens, case.heads * case.head_dim)
            images = (testing.make_tensor(*rows, dtype=dtype, seed=seed) for seed in range(3))
            return [t.unflatten(-1, (case.heads, case.head_dim)).transpose(1, 2) for t in images]
        sizes = (case.batch, case.heads, 3 * case.head_dim, case.tokens)
        return list(testing.split_heads(testing.make_tensor(*sizes, dtype=dtype)))

    def timm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return rla.timm(q, k, v, rla.EPS)

    return GpuCase(
        suite="gpu-attention" + ("-training" if training else ""),
        name=case.name + (f", batch {case.batch}" if "batch" not in case.name and case.batch > 1 else ""),
        dtype=dtype,
        sizes={"batch": case.batch, "heads": case.heads, "head_dim": case.head_dim, "tokens": case.tokens},
        work=rla.work(case, dtype, training),
        make=make,
        truth=partial(OPERATORS["relu_linear_attention"].plain, eps=rla.EPS),
        ours=effattn.relu_linear_attention,
        peers={"official": rla.official, "timm": timm},
        context={} if training else {"softmax (SDPA)": functional.scaled_dot_product_attention},
        training=training,
    )


def attention(training: bool) -> list[GpuCase]:
    named = {case.name: case for case in ATTENTION_CASES}
    stage = named["b1 stage 3 @224"]
    batches = [AttentionCase(stage.name, b, stage.heads, stage.head_dim, 14, 14) for b in BATCHES[1:]]
    cases = [named["b1 stage 3 @1024x2048"], named["l2 stage 4 @1024x2048"], stage, *batches]
    long = AttentionCase("N 65536, 16 heads of 32", 1, 16, 32, 256, 256)
    return [
        *(_attention(case, NARROW, training) for case in (cases[0], long)),
        _attention(SANA, torch.float16, training, token_major=True),
        *(_attention(case, NARROW, training) for case in cases[1:]),
        _attention(cases[0], torch.float32, training),
    ]


# --- multi_scale_linear_attention -----------------------------------------------------------------------


def _multi_scale(name: str, case: MultiScaleCase, training: bool, dtype: torch.dtype = NARROW) -> GpuCase:
    def make() -> Arguments:
        inputs = case.inputs(dtype)
        return [inputs["qkv"], inputs["dw_weights"], inputs["pw_weights"]]

    def ours(qkv: torch.Tensor, dw: list[torch.Tensor], pw: list[torch.Tensor]) -> torch.Tensor:
        return effattn.multi_scale_linear_attention(qkv, dw, pw, head_dim=case.head_dim)

    def official(qkv: torch.Tensor, dw: list[torch.Tensor], pw: list[torch.Tensor]) -> torch.Tensor:
        inputs = {"qkv": qkv, "dw_weights": dw, "pw_weights": pw, "dw_biases": [], "pw_biases": []}
        return testing.official_multi_scale_attention(case, inputs, upcast=True)

    pixels = case.batch * case.height * case.width
    per_pixel = case.channels * sum(2 * (k * k + case.head_dim) for k in case.kernels)
    per_pixel += (1 + len(case.kernels)) * case.heads * case.head_dim * (case.head_dim + 1) * 4
    outputs = (1 + len(case.kernels)) * case.channels // 3
    return GpuCase(
        suite="gpu-multi-scale" + ("-training" if training else ""),
        name=name,
        dtype=dtype,
        sizes={"batch": case.batch, "heads": case.heads, "head_dim": case.head_dim, "height": case.height},
        work=_work(pixels * per_pixel, pixels * case.channels, pixels * outputs, training, dtype),
        make=make,
        truth=lambda qkv, dw, pw: OPERATORS["multi_scale_linear_attention"].plain(
            qkv, dw, pw, (), (), case.head_dim, 1e-15
        ),
        ours=ours,
        peers={STOCK: official},
        training=training,
    )


def multi_scale(training: bool) -> list[GpuCase]:
    cases = {
        "b1 stage 3 @1024x2048": MultiScaleCase(1, 8, 16, 64, 128),
        "l2 SAM stage 4 @1024": MultiScaleCase(1, 16, 32, 32, 32),
        **{f"b1 stage 3 @224, batch {b}": MultiScaleCase(b, 8, 16, 14, 14) for b in BATCHES},
        "b3 stage 3 @512, batch 4": MultiScaleCase(4, 8, 32, 32, 32),
    }
    return [_multi_scale(name, case, training) for name, case in cases.items()]


# --- cascaded_group_attention ---------------------------------------------------------------------------


def _cascade(name: str, case: CascadeCase, training: bool, dtype: torch.dtype = NARROW) -> GpuCase:
    heads = len(case.kernels)
    value_dim, scale = case.channels // heads, case.key_dim**-0.5
    window = (case.height, case.width) if case.window is None else (case.window, case.window)
    assert isinstance(window[0], int) and isinstance(window[1], int)
    tokens = window[0] * window[1]

    def ours(x: torch.Tensor, *weights: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        return effattn.cascaded_group_attention(x, *weights, scale=scale, window_size=window)

    def stock(x: torch.Tensor, *weights: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """As in the models, with windows by permutation; in the type of the image, as under autocast."""
        return _stock_cascade(x, *weights, scale, window)

    pixels = case.batch * case.height * case.width
    per_pixel = sum(
        2 * (value_dim * (2 * case.key_dim + value_dim) + k * k * case.key_dim + tokens * (case.key_dim + value_dim))
        for k in case.kernels
    )
    return GpuCase(
        suite="gpu-cascade" + ("-training" if training else ""),
        name=name,
        dtype=dtype,
        sizes={"batch": case.batch, "channels": case.channels, "heads": heads, "size": case.height},
        work=_work(pixels * per_pixel, pixels * case.channels, pixels * case.channels, training, dtype),
        make=lambda: _inputs(case, dtype),
        truth=lambda *arguments: OPERATORS["cascaded_group_attention"].plain(*arguments, scale, *window),
        ours=ours,
        peers={STOCK: stock},
        training=training,
    )


def _inputs(case: CascadeCase | BiasedCase, dtype: torch.dtype) -> Arguments:
    return [value for value in case.inputs(dtype).values() if not isinstance(value, list) or value]


def _stock_cascade(
    x: torch.Tensor,
    qkv: list[torch.Tensor],
    qkv_biases: list[torch.Tensor],
    dw: list[torch.Tensor],
    dw_biases: list[torch.Tensor],
    bias: torch.Tensor,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    (batch, channels, height, width), (rows, cols), heads = x.shape, window, len(qkv)
    down, across, key_dim = height // rows, width // cols, dw[0].shape[0]
    windows = x.reshape(batch, channels, down, rows, across, cols).permute(0, 2, 4, 1, 3, 5)
    outs: list[torch.Tensor] = []
    for i, group in enumerate(windows.reshape(-1, channels, rows, cols).chunk(heads, 1)):
        feat = group if i == 0 else group + outs[-1]
        made = functional.conv2d(feat, qkv[i].to(x.dtype), qkv_biases[i].to(x.dtype))
        q, k, v = made.split([key_dim, key_dim, channels // heads], dim=1)
        side = dw[i].shape[-1]
        q = functional.conv2d(q, dw[i].to(x.dtype), dw_biases[i].to(x.dtype), padding=side // 2, groups=key_dim)
        logits = scale * (q.flatten(2).mT @ k.flatten(2)) + bias[i].to(x.dtype)
        outs.append((v.flatten(2) @ logits.softmax(dim=-1).mT).reshape(-1, channels // heads, rows, cols))
    joined = torch.cat(outs, dim=1).reshape(batch, down, across, channels, rows, cols)
    return joined.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def cascade(training: bool) -> list[GpuCase]:
    cases = {
        **{f"m4 stage 1, batch {b}": CascadeCase(b, 128, 16, 14, 14, 7, (7, 5, 3, 3)) for b in BATCHES},
        "m4 stage 2, batch 1": CascadeCase(1, 256, 16, 7, 7, None, (7, 5, 3, 3)),
        "m4 stage 3, batch 256": CascadeCase(256, 384, 16, 4, 4, None, (7, 5, 3, 3)),
        "m5 stage 1 @896, batch 1": CascadeCase(1, 192, 16, 56, 56, 7, (7, 5, 3)),
    }
    return [_cascade(name, case, training) for name, case in cases.items()]


# --- biased_attention -----------------------------------------------------------------------------------


def _biased(name: str, case: BiasedCase, training: bool, dtype: torch.dtype = NARROW) -> GpuCase:
    scale = case.head_dim**-0.5

    def ours(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mixing: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        return effattn.biased_attention(q, k, v, bias, scale=scale, talking_heads=mixing)

    def stock(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mixing: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        logits = scale * (q @ k.mT) + bias.to(q.dtype)
        if mixing is not None:
            logits = mix_heads(logits, mixing[:2])
        weights = logits.softmax(dim=-1)
        return (weights if mixing is None else mix_heads(weights, mixing[2:])) @ v

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=scale)

    peers: dict[str, Callable[..., torch.Tensor]] = {STOCK: stock}
    pairs = case.batch * case.heads * case.queries * case.keys
    tokens = case.batch * case.heads * (case.queries + case.keys)
    return GpuCase(
        suite="gpu-biased" + ("-training" if training else ""),
        name=name,
        dtype=dtype,
        sizes={"batch": case.batch, "heads": case.heads, "queries": case.queries, "keys": case.keys},
        work=_work(
            2 * pairs * (case.head_dim + case.value_dim + (2 * case.heads if case.talking else 0)),
            tokens * (case.head_dim + case.value_dim / 2),
            tokens * case.value_dim / 2,
            training,
            dtype,
        ),
        make=lambda: _inputs(case, dtype),
        truth=lambda q, k, v, bias, mixing=(): OPERATORS["biased_attention"].plain(q, k, v, bias, mixing, scale),
        ours=ours,
        peers=peers if case.talking else peers | {"SDPA": sdpa},
        training=training,
    )


def biased(training: bool) -> list[GpuCase]:
    cases = {
        **{f"EfficientFormer-L1, batch {b}": BiasedCase(b, 8, 49, 49, 32, 128) for b in BATCHES},
        **{f"EfficientFormerV2, batch {b}": BiasedCase(b, 8, 49, 49, 32, 128, talking=True) for b in (1, 256)},
        "1024 tokens, batch 16": BiasedCase(16, 8, 1024, 1024, 32, 64),
    }
    return [_biased(name, case, training) for name, case in cases.items()]


# --- whole models ---------------------------------------------------------------------------------------


def _model(name: str, batch: int) -> GpuCase:
    modules: list[torch.nn.Module] = []  # in float64, stock, accelerated; made when the case is measured

    def make() -> Arguments:
        torch.manual_seed(0)
        stock = testing.import_timm().create_model(name).eval()
        testing.randomise_batch_norm(stock)
        testing.randomise_what_starts_at_zero(stock)
        accelerated, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
        effattn.accelerate(accelerated)
        effattn.accelerate(exact)  # timm's attention computes in float32 whatever comes
        device = "cuda" if torch.cuda.is_available() else "cpu"
        half = (m.half().to(device, memory_format=torch.channels_last) for m in (stock, accelerated))
        modules[:] = exact.to(device), *half
        return [testing.make_image(batch, 3, 224, 224, "channels_last").half()]

    def called(which: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = modules[which](x)
            return out

        return call

    return GpuCase(
        suite="gpu-models",
        name=f"{name} @224, batch {batch}",
        dtype=torch.float16,
        sizes={"batch": batch},
        work=Work(bytes=0, flops=0),
        make=make,
        truth=called(0),
        ours=called(2),
        peers={STOCK: called(1)},
        compile_ours=True,
        tolerance=5e-2,
    )


def models() -> list[GpuCase]:
    models = ("efficientvit_m0", "efficientvit_b1", "efficientformer_l1", "efficientvit_m5", "efficientvit_b3")
    return [_model(name, batch) for batch in (1, 256) for name in models]


#: By suite, its title and its cases.
SUITES: dict[str, tuple[str, Callable[[], list[GpuCase]]]] = {
    "gpu-attention": ("relu_linear_attention, forward", partial(attention, False)),
    "gpu-multi-scale": ("multi_scale_linear_attention, forward", partial(multi_scale, False)),
    "gpu-cascade": ("cascaded_group_attention, forward", partial(cascade, False)),
    "gpu-biased": ("biased_attention, forward", partial(biased, False)),
    "gpu-attention-training": ("relu_linear_attention, forward and backward", partial(attention, True)),
    "gpu-multi-scale-training": ("multi_scale_linear_attention, forward and backward", partial(multi_scale, True)),
    "gpu-cascade-training": ("cascaded_group_attention, forward and backward", partial(cascade, True)),
    "gpu-biased-training": ("biased_attention, forward and backward", partial(biased, True)),
    "gpu-models": ("whole models, inference, float16", models),
}


def name_of(case: GpuCase) -> str:
    """As :mod:`benchmarks.gpu.names` has it."""
    return f"{case.suite}: {case.name}, {str(case.dtype).removeprefix('torch.')}"


# --- smoke ----------------------------------------------------------------------------------------------


def _aggregation(case: MultiScaleCase, training: bool, dtype: torch.dtype) -> GpuCase:
    """The convolutions of multi-scale attention alone."""

    def ours(qkv: torch.Tensor, dw: list[torch.Tensor], pw: list[torch.Tensor]) -> torch.Tensor:
        return effattn.multi_scale_aggregation(qkv, dw, pw, head_dim=case.head_dim)

    def plain(qkv: torch.Tensor, dw: list[torch.Tensor], pw: list[torch.Tensor]) -> torch.Tensor:
        return OPERATORS["multi_scale_aggregation"].plain(qkv, dw, pw, (), (), case.head_dim)

    attention = _multi_scale("smoke", case, training, dtype)
    return dataclasses.replace(attention, suite="gpu-aggregation", truth=plain, ours=ours, peers={STOCK: plain})


def smoke(operator: str, dtype: torch.dtype, training: bool) -> list[GpuCase]:
    """Small cases of one of ``names.SMOKE``, no multiples of a tile; they take different ways through its kernels.

    Raises:
        ValueError: for an operator that there is not.
    """
    images = [MultiScaleCase(2, 2, 16, 9, 21), MultiScaleCase(1, 1, 32, 33, 40, (3, 5))]
    several_tiles = MultiScaleCase(8, 8, 16, 33, 40)  # of a block: more than a card's multiprocessors take at once
    if operator == "relu_linear_attention":
        sizes = [AttentionCase("few tokens", 2, 3, 16, 7, 11), AttentionCase("many tokens", 1, 2, 32, 40, 77)]
        return [_attention(case, dtype, training, major) for case in sizes for major in (False, True)]
    if operator == "multi_scale_linear_attention":
        return [_multi_scale("smoke", case, training, dtype) for case in (*images, several_tiles)]
    if operator == "multi_scale_aggregation":
        return [_aggregation(case, training, dtype) for case in images]
    if operator == "cascaded_group_attention":
        windows = [CascadeCase(2, 32, 16, 14, 14, 7, (7, 5, 3, 3)), CascadeCase(1, 24, 16, 9, 9, None, (5, 3))]
        return [_cascade("smoke", case, training, dtype) for case in windows]
    if operator in ("biased_attention", "biased_attention with talking heads"):
        talking = operator != "biased_attention"
        tokens = [BiasedCase(2, 4, 49, 49, 16, 32, talking), BiasedCase(1, 2, 70, 133, 32, 24, talking)]
        return [_biased("smoke", case, training, dtype) for case in tokens]
    raise ValueError(f"operator: expected one of {', '.join(names.SMOKE)}, got {operator!r}")
