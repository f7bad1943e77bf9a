"""relu_linear_attention and its peers: formulations, ONNX graphs, inputs, gates and lists of candidates.

A formulation takes q, k, v as (..., N, D) views of either memory order. In a model they come out of a
convolution on NCHW, channel-major; token-major is what a linear layer leaves behind. Every peer is timed
in both, and its best counts; the headline number of effattn is the channel-major one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch.nn import functional

import effattn
from benchmarks import peers
from benchmarks.floor import Work
from benchmarks.runner import GATE, Accuracy, Call, Candidate, Case, Role
from effattn import testing, tolerance
from effattn.ops import OPERATORS

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: The operator.
NAME = "relu_linear_attention"
FUNCTION = effattn.relu_linear_attention
LAYOUTS = ("channel-major", "token-major")
EPS = 1e-15
OURS = "effattn"
STOCK = "official eager"
CHECK = f"{STOCK} (again)"


# --- cases ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCase:
    """A benchmark shape of relu_linear_attention: ``heads`` includes the scales, N = height * width."""

    name: str
    batch: int
    heads: int
    head_dim: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width

    def qkv(self, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> torch.Tensor:
        """(B, heads, 3 D, N), what LiteMLA's convolutions leave behind."""
        qkv = testing.make_tensor(self.batch, self.heads, 3 * self.head_dim, self.tokens, dtype=dtype)
        return qkv.requires_grad_(requires_grad)


#: The shapes of real models, from small to large.
ATTENTION_CASES = (
    AttentionCase("b1 stage 3 @224", 1, 16, 16, 14, 14),
    AttentionCase("b1 stage 4 @224", 1, 32, 16, 7, 7),
    AttentionCase("b3 stage 3 @224, batch 16", 16, 32, 32, 14, 14),
    AttentionCase("l2 SAM stage 4 @1024", 1, 32, 32, 32, 32),
    AttentionCase("b1 stage 4 @1024x2048", 1, 32, 16, 32, 64),
    AttentionCase("b1 stage 3 @1024x2048", 1, 16, 16, 64, 128),
    AttentionCase("l2 stage 4 @1024x2048", 1, 32, 32, 32, 64),
    AttentionCase("Sana @1024, batch 2", 2, 70, 32, 32, 32),
)


def split_heads(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as (B, heads, N, D) views of (B, heads, 3 D, N)."""
    q, k, v = qkv.transpose(-1, -2).chunk(3, dim=-1)
    return q, k, v


# --- formulations ---------------------------------------------------------------------------------------


def official(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """As in the authors' repository: channels first, a row of ones under v carries the denominator."""
    return _official(q.mT, k.mT, v.mT, eps).mT


def _official(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """On (..., D, N)."""
    query, key, value = q.relu().float(), k.relu().float(), v.float()
    value = functional.pad(value, (0, 0, 0, 1), mode="constant", value=1.0)
    out = torch.matmul(torch.matmul(value, key.mT), query)
    return (out[..., :-1, :] / (out[..., -1:, :] + eps)).to(q.dtype)


def timm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """As in timm: tokens first, a column of ones beside v, everything cast to float32 first."""
    dtype = v.dtype
    query, key = q.relu(), k.relu()
    value = functional.pad(v, (0, 1), mode="constant", value=1.0)
    query, key, value = query.float(), key.float(), value.float()
    out = query @ (key.transpose(-1, -2) @ value)
    return (out[..., :-1] / (out[..., -1:] + eps)).to(dtype)


FORMULATIONS: dict[str, Callable[..., torch.Tensor]] = {"official": official, "timm": timm}


class Formulation(torch.nn.Module):
    """The official formulation on (B, h, D, N), or timm's on (B, h, N, D), for what takes a module."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.function = _official if layout == "channel-major" else timm

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.function(q, k, v)


def onnx_graph(layout: str, sizes: Iterable[int], dtype: torch.dtype, eps: float = EPS) -> Any:
    """The official formulation on (B, h, D, N), or timm's on (B, h, N, D), as an ONNX model."""
    from onnx import checker, parser

    batch, heads, rows, columns = sizes
    axis = 2 if layout == "channel-major" else 3
    dim = rows if axis == 2 else columns
    kind = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
    type_ = f"{kind}[{batch}, {heads}, {rows}, {columns}]"
    pads = ", ".join("1" if i == 4 + axis else "0" for i in range(8))
    products = (
        "sums = MatMul(values, keys_t)\n products = MatMul(sums, queries)"
        if axis == 2
        else "sums = MatMul(keys_t, values)\n products = MatMul(queries, sums)"
    )
    # to = 1 is float: the sums live in float32, as in both formulations.
    model = parser.parse_model(f"""
        <ir_version: 9, opset_import: ["": 18]>
        relu_linear_attention ({type_} q, {type_} k, {type_} v) => ({type_} out)
        <float eps = {{{eps}}}, float one = {{1.0}}, int64[8] pads = {{{pads}}}, int64[2] parts = {{{dim}, 1}}> {{
            q32 = Cast<to: int = 1>(q)
            k32 = Cast<to: int = 1>(k)
            v32 = Cast<to: int = 1>(v)
            queries = Relu(q32)
            keys = Relu(k32)
            values = Pad(v32, pads, one)
            keys_t = Transpose<perm = [0, 1, 3, 2]>(keys)
            {products}
            numerator, denominator = Split<axis: int = {axis}>(products, parts)
            shifted = Add(denominator, eps)
            out32 = Div(numerator, shifted)
            out = CastLike(out32, q)
        }}""")
    checker.check_model(model)
    return model


# --- data and gates -------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """q, k, v of a case in every layout, and the truth in float64. All values are the same."""

    case: AttentionCase
    dtype: torch.dtype
    training: bool = False
    _bounds: dict[int, tuple[dict[str, torch.Tensor], dict[str, float]]] = field(default_factory=dict, repr=False)

    @cached_property
    def _storage(self) -> dict[str, torch.Tensor]:
        qkv = self.case.qkv(self.dtype)
        return {"channel-major": qkv, "token-major": qkv.mT.contiguous().mT}

    def qkv(self, layout: str) -> Qkv:
        """Views (B, h, N, D) of one tensor; for training each is a leaf, so that only the operator counts."""
        q, k, v = (t.detach().requires_grad_(self.training) for t in split_heads(self._storage[layout]))
        return q, k, v

    def separate(self, layout: str) -> peers.Tensors:
        """Three contiguous tensors, (B, h, D, N) or (B, h, N, D): a runtime could not bind views of one."""
        q, k, v = self.qkv(layout)
        named = {"q": q, "k": k, "v": v}
        return {name: (t.mT if layout == "channel-major" else t).contiguous() for name, t in named.items()}

    def grad_out(self, layout: str) -> torch.Tensor:
        q = self.qkv(layout)[0]
        values = testing.make_tensor(*q.shape, layout="channel_major", dtype=self.dtype, seed=1)
        return values if layout == "channel-major" else values.contiguous()

    def _reference(self) -> dict[str, torch.Tensor]:
        """The output, and for training the gradients, of the plain formulation in float64."""
        leaves = [t.detach().double().requires_grad_(self.training) for t in self.qkv("channel-major")]
        out = OPERATORS[NAME].plain(*leaves, EPS)
        if not self.training:
            return {"out": out}
        grads = torch.autograd.grad(out, leaves, self.grad_out("channel-major").double())
        return {"out": out.detach(), **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))}

    def bounds(self, draws: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The truth, and what each result may be off: the rule of the tests."""
        if draws not in self._bounds:
            truth, allowed, _ = tolerance.bounds(
                self._reference, self.case.tokens, rounded=lambda _, t: t.to(self.dtype), draws=draws
            )
            self._bounds[draws] = truth, allowed
        return self._bounds[draws]

    @property
    def truth(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.bounds(tolerance.DRAWS)[0].values())


def _results(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _worst(accuracies: Iterable[Accuracy]) -> Accuracy:
    """The one that is nearest to failing, or has failed."""
    return max(accuracies, key=lambda a: (not a.passed, a.error / a.allowed))


def our_gate(data: Inputs, result: Any) -> Accuracy:
    """As accurate as the tests ask."""
    for draws in (tolerance.DRAWS, tolerance.MANY_DRAWS):
        worst = _worst(
            Accuracy(tolerance.error(ours, truth) / norm, allowed / norm)
            for ours, truth, allowed in zip(_results(result), data.truth, data.bounds(draws)[1].values(), strict=True)
            for norm in [torch.linalg.vector_norm(truth).item()]
        )
        if worst.passed:
            break
    return worst


def peer_gate(data: Inputs, result: Any) -> Accuracy:
    return _worst(
        Accuracy(tolerance.error(theirs, truth) / torch.linalg.vector_norm(truth).item(), GATE[data.dtype])
        for theirs, truth in zip(_results(result), data.truth, strict=True)
    )


# --- candidates -----------------------------------------------------------------------------------------


def torch_call(function: Callable[..., torch.Tensor], layout: str, data: Inputs) -> Call:
    q, k, v = data.qkv(layout)
    if not data.training:
        return partial(function, q, k, v)
    grad_out = data.grad_out(layout)

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        out = function(q, k, v)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)

    return forward_and_backward


def _compiled_call(function: Callable[..., torch.Tensor], layout: str, data: Inputs) -> Call:
    return torch_call(peers.compiled(function), layout, data)


def _onnx_call(run: Callable[..., Callable[[], peers.Tensors]], layout: str, data: Inputs) -> Call:
    inputs = data.separate(layout)
    outputs = {"out": torch.empty_like(inputs["v"])}
    call = run(onnx_graph(layout, inputs["q"].shape, data.dtype), inputs, outputs)
    out = outputs["out"].mT if layout == "channel-major" else outputs["out"]
    return lambda: (call(), out)[1]


def _exported_call(run: Callable[..., Callable[[], torch.Tensor]], layout: str, data: Inputs) -> Call:
    call = run(Formulation(layout).eval(), tuple(data.separate(layout).values()))
    return (lambda: call().mT) if layout == "channel-major" else call


def _in_layouts(name: str, build: Callable[..., Call], note: str = "") -> list[Candidate]:
    """A peer in both; ``build`` is given the layout first."""
    return [Candidate(name, layout + note, Role.PEER, partial(build, layout), peer_gate) for layout in LAYOUTS]


def effattn_candidates() -> list[Candidate]:
    return [
        Candidate(name, layout, role, partial(torch_call, FUNCTION, layout), our_gate)
        for layout, name, role in zip(LAYOUTS, (OURS, f"{OURS}, {LAYOUTS[1]}"), (Role.OURS, Role.CONTEXT), strict=True)
    ]


def eager_candidates() -> list[Candidate]:
    named = FORMULATIONS.items()
    return [c for name, function in named for c in _in_layouts(f"{name} eager", partial(torch_call, function))]


def compiled_candidates(*names: str) -> list[Candidate]:
    named = ((name, partial(_compiled_call, FORMULATIONS[name])) for name in names)
    return [candidate for name, build in named for candidate in _in_layouts(f"{name} compiled", build)]


def runtime_candidates(dtype: torch.dtype) -> list[Candidate]:
    """onnxruntime and OpenVINO; for narrow types OpenVINO also with its own arithmetic in that type.

    In float32 TFLite and ExecuTorch too.
    """
    found = _in_layouts("onnxruntime", partial(_onnx_call, peers.onnxruntime_call))
    found += _in_layouts("OpenVINO", partial(_onnx_call, peers.openvino_call))
    if dtype != torch.float32:
        hint = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
        run = partial(peers.openvino_call, precision=hint)
        return found + _in_layouts("OpenVINO", partial(_onnx_call, run), f", {hint} hint")
    found += _in_layouts("TFLite", partial(_exported_call, peers.tflite_call))
    return found + _in_layouts("ExecuTorch", partial(_exported_call, peers.executorch_call))


def check_candidate() -> Candidate:
    layout = LAYOUTS[0]
    return Candidate(CHECK, layout, Role.CHECK, partial(torch_call, official, layout), peer_gate)


def softmax_candidate(build: Callable[[Inputs], Call] | None = None) -> Candidate:
    """Softmax attention, a different function: what linear attention is there to replace."""
    return Candidate("softmax (SDPA)", "token-major", Role.CONTEXT, build or softmax_call, softmax_gate)


def softmax_call(data: Inputs) -> Call:
    q, k, v = data.separate("token-major").values()
    return partial(functional.scaled_dot_product_attention, q, k, v)


def softmax_gate(data: Inputs, result: Any) -> Accuracy:
    """On the last queries only: all of them in float64 would take gigabytes."""
    q, k, v = (t.double() for t in data.separate("token-major").values())
    truth = torch.softmax(q[..., -64:, :] @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v
    difference = tolerance.error(result[..., -64:, :], truth)
    return Accuracy(difference / torch.linalg.vector_norm(truth).item(), GATE[data.dtype])


# --- cases ----------------------------------------------------------------------------------------------


def work(case: AttentionCase, dtype: torch.dtype, training: bool) -> Work:
    """Each input read once, each output written once; the two products and the normaliser, in a backward twice."""
    tokens, channels = case.batch * case.heads * case.tokens, case.head_dim
    elements = (11 if training else 4) * tokens * channels
    return Work(elements * dtype.itemsize, 4 * tokens * channels * (channels + 1) * (3 if training else 1), dtype)


def make_case(
    case: AttentionCase, candidates: Iterable[Candidate], dtype: torch.dtype = torch.float32, training: bool = False
) -> Case:
    return Case(
        name=case.name,
        dtype=dtype,
        sizes={name: size for name, size in asdict(case).items() if name != "name"},
        work=work(case, dtype, training),
        candidates=tuple(candidates),
        prepare=partial(Inputs, case, dtype, training),
        training=training,
    )
