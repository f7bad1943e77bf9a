"""A valid call of each operator of a module's inference, whose weights are packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from effattn.nn.programs.builder import Builder
from effattn.ops import INFERENCE_OPERATORS, OPERATORS
from effattn.ops import block as block_op
from effattn.ops import cascaded_group_attention_projected as cascade_op
from effattn.ops import projected_attention as attention_op
from effattn.ops._operator import InferenceOperator
from effattn.testing import make_arguments, make_image, make_tensor

CHANNELS, HEIGHT, WIDTH, OUT = 24, 7, 5, 9
LITE_MLA = {"B": 2, "C": CHANNELS, "H": HEIGHT, "W": WIDTH, "C_out": OUT, "heads": 2, "head_dim": 4, "S": 1, "k": (5,)}
CASCADE = {"B": 2, "heads": 2, "d": CHANNELS // 2, "key_dim": 6, "k": (7, 3), "H": HEIGHT, "W": WIDTH, "scale": 0.25}


def call_lite_mla(x: torch.Tensor) -> torch.Tensor:
    operator = INFERENCE_OPERATORS["lite_mla"]
    return operator(x, *make_arguments(operator, LITE_MLA | {"eps": 1e-15})[1:])


def call_cascade(x: torch.Tensor) -> torch.Tensor:
    case = CASCADE | {"window_height": 4, "window_width": 4}
    _, *weights, scale, height, width = make_arguments(OPERATORS["cascaded_group_attention"], case)
    packed = cascade_op.pack(cascade_op.Weights(*weights, *convolution(OUT, CHANNELS, 70)))
    return cascade_op.projected(x, packed, scale, height, width)


def call_projected_attention(x: torch.Tensor) -> torch.Tensor:
    bias = make_tensor(2, HEIGHT * WIDTH, HEIGHT * WIDTH, seed=50)
    return attention_op.projected_attention(x, attention_op.pack(*qkv(), bias, convolution(OUT, 12, 40)), 0.5)


def call_halved_attention(x: torch.Tensor, queries_alone: bool) -> torch.Tensor:
    queries = -(-HEIGHT // 2) * -(-WIDTH // 2)
    keys = HEIGHT * WIDTH if queries_alone else queries
    depthwise = [(make_tensor(c, 1, 3, 3, seed=60), make_tensor(1, c, seed=61)[0]) for c in (12, CHANNELS)]
    weights = attention_op.pack(
        *qkv(),
        make_tensor(2, queries, keys, seed=50),
        convolution(OUT, 12, 40),
        local=depthwise[0],
        halving=depthwise[1],
        halves_queries_alone=queries_alone,
    )
    out_size = None if queries_alone else (HEIGHT, WIDTH)
    return attention_op.projected_attention(x, weights, 0.1, activation="gelu", out_size=out_size)


def qkv() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of two heads."""
    return [convolution(outputs, CHANNELS, seed) for outputs, seed in ((8, 10), (8, 20), (12, 30))]


def convolution(outputs: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return make_tensor(outputs, inputs, seed=seed), make_tensor(1, outputs, seed=seed + 1)[0]


def call_block(x: torch.Tensor) -> torch.Tensor:
    builder = Builder(CHANNELS)
    wide = builder.convolution(0, make_tensor(30, CHANNELS, seed=80)[..., None, None], None, activation="hardswish")
    mixed = builder.convolution(wide, make_tensor(30, 1, 3, 3, seed=81), None, groups=30)
    builder.convolution(mixed, make_tensor(OUT, 30, seed=82)[..., None, None], None)
    return block_op.block(x, builder.finish())


#: Of images (2, CHANNELS, HEIGHT, WIDTH).
CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "lite_mla": call_lite_mla,
    "cascade": call_cascade,
    "projected attention": call_projected_attention,
    "halved attention": lambda x: call_halved_attention(x, False),
    "block": call_block,
    "halved queries": lambda x: call_halved_attention(x, True),
}


def arguments_of_calls() -> dict[str, list[list[Any]]]:
    """By operator, the arguments of its calls."""
    found: dict[str, list[list[Any]]] = {}

    def note(operator: InferenceOperator, *arguments: Any) -> None:
        found.setdefault(operator.name, []).append(list(arguments))

    with mock.patch.object(InferenceOperator, "__call__", note):
        for call in CALLS.values():
            call(make_image(2, CHANNELS, HEIGHT, WIDTH))
    return found
