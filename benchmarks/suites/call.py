"""What a call costs when there is next to nothing to compute: one token, one head."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import linear_attention as rla
from benchmarks import peers
from benchmarks.floor import Work
from benchmarks.linear_attention import EPS, LAYOUTS, OURS, Inputs
from benchmarks.runner import Accuracy, Candidate, Case, Role
from benchmarks.suites.base import TimedSuite

CASE = rla.AttentionCase("one token", 1, 1, 16, 1, 1)

_OPERATOR = getattr(torch.ops.effattn, rla.NAME).default


def _operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _OPERATOR(q, k, v, EPS)


def _addition(q: torch.Tensor, k: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.add.Tensor(q, k)


def _no_token(data: Inputs) -> Any:
    """The call and nothing else: without queries the kernel returns at once."""
    q, k, v = data.qkv(LAYOUTS[0])
    return partial(rla.FUNCTION, q[:, :, :0], k, v)


def _no_token_gate(_: Inputs, result: Any) -> Accuracy:
    return Accuracy(float(result.numel()), 0.0)


def _addition_gate(data: Inputs, result: Any) -> Accuracy:
    q, k, _ = data.qkv(LAYOUTS[0])
    return Accuracy((result - (q + k)).abs().max().item(), 0.0)


def _compiled(data: Inputs) -> Any:
    return rla.torch_call(peers.compiled(rla.FUNCTION), LAYOUTS[0], data)


def _cases(short: bool) -> list[Case]:
    layout = LAYOUTS[0]
    candidates = (
        *rla.eager_candidates(),
        *rla.effattn_candidates()[:1],
        Candidate(f"{OURS}'s operator", layout, Role.CONTEXT, partial(rla.torch_call, _operator, layout), rla.our_gate),
        Candidate(f"{OURS} compiled", layout, Role.CONTEXT, _compiled, rla.our_gate),
        Candidate(f"{OURS}, no token", layout, Role.CONTEXT, _no_token, _no_token_gate),
        Candidate("aten::add", layout, Role.CONTEXT, partial(rla.torch_call, _addition, layout), _addition_gate),
        rla.check_candidate(),
    )
    return [replace(rla.make_case(CASE, candidates), work=Work(bytes=0, flops=0))]


CALL = TimedSuite("call", f"the cost of a call: {rla.NAME} of one token, float32", _cases)
