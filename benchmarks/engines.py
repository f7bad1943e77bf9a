"""Models and single operators in onnxruntime and OpenVINO: as these run them, and with effattn's nodes.

Without nodes, they get the stock model, by each of torch's two exporters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

import effattn
from benchmarks import modules, peers
from benchmarks.floor import Work
from benchmarks.modules import ModuleCase, model_case
from benchmarks.runner import GATE, Accuracy, Call, Candidate, Case, Role
from effattn import testing, tolerance
from effattn.ops import OPERATORS

ENGINES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[], Any]]] = {
    "onnxruntime": (peers.onnxruntime_call, peers.onnxruntime_session, lambda: effattn.onnxruntime.library()),
    "OpenVINO": (peers.openvino_call, peers.openvino_request, lambda: effattn.openvino.library()),
}
#: Exports of the stock model.
EXPORTS = ("traced", "dynamo")


_NAMES: dict[str, Any] = {"input_names": ["x"], "output_names": ["out"]}


class Files(modules.Inputs):
    """A model's exports, made when they are asked for."""

    @cached_property
    def with_nodes(self) -> Any:
        return effattn.export.to_onnx(self.module, self.x, **_NAMES).model

    @cached_property
    def stock_dynamo(self) -> Any:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(self.module, (self.x,), dynamo=True, verbose=False, **_NAMES)
        assert program is not None
        return program.model_proto

    def stock(self, export: str) -> Any:
        return self.onnx_model if export == "traced" else self.stock_dynamo


#: The last one: a case with two numbers of threads is exported once.
_last: dict[str, Files] = {}


def _files(case: ModuleCase) -> Files:
    if case.name not in _last:
        _last.clear()
        _last[case.name] = Files(case)
    return _last[case.name]


def _run(engine: str, export: str | None, data: Files) -> Call:
    """A model without nodes by an exporter, or with them."""
    run, _, library = ENGINES[engine]
    with torch.no_grad():
        outputs = {"out": torch.empty(data.module(data.x).shape)}
    if export is None:
        call = run(data.with_nodes, {"x": data.x}, outputs, library=str(library()))
    else:
        call = run(data.stock(export), {"x": data.x}, outputs)
    return lambda: tuple(call().values())


def ours(engine: str) -> str:
    return f"{modules.OURS} in {engine}"


def model_candidates() -> tuple[Candidate, ...]:
    stock = [
        Candidate(engine, export, Role.PEER, partial(_run, engine, export), modules.gate)
        for engine in ENGINES
        for export in EXPORTS
    ]
    with_nodes = [
        Candidate(ours(engine), "NCHW", Role.OURS, partial(_run, engine, None), modules.gate) for engine in ENGINES
    ]
    check = Candidate(
        "onnxruntime (again)", EXPORTS[1], Role.CHECK, partial(_run, "onnxruntime", EXPORTS[1]), modules.gate
    )
    accelerated = modules.torch_candidates(accelerated=True, compiled=False)
    return (*stock, *with_nodes, *accelerated, check)


def make_model_case(case: ModuleCase, one_thread: bool = False) -> Case:
    return Case(
        name=case.name + (", one thread" if one_thread else ""),
        dtype=torch.float32,
        sizes=case.sizes,
        work=modules.NO_FLOOR,
        candidates=model_candidates(),
        prepare=partial(_files, case),
        threads=1 if one_thread else None,
    )


class Segmentation(nn.Module):
    """A backbone of timm under the head of EfficientViT-Seg: its last three stages, as large as the first of them."""

    def __init__(self, backbone: str, channels: int, classes: int) -> None:
        super().__init__()
        self.backbone = testing.import_timm().create_model(backbone, features_only=True)
        stages = self.backbone.feature_info.channels()[-3:]
        self.inputs = nn.ModuleList(nn.Conv2d(stage, channels, 1) for stage in stages)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = (conv(stage) for conv, stage in zip(self.inputs, self.backbone(x)[-3:], strict=True))
        for stage in rest:
            first = first + nn.functional.interpolate(stage, size=first.shape[2:], mode="bilinear")
        out: torch.Tensor = self.classify(first)
        return out


def segmentation_case(name: str, backbone: str, height: int, width: int) -> ModuleCase:
    sizes = {"batch": 1, "height": height, "width": width}
    return ModuleCase(name, partial(Segmentation, backbone, 64, 19), (1, 3, height, width), sizes, is_model=True)


# --- bfloat16 -------------------------------------------------------------------------------------------------------


def _narrow(with_nodes: bool, data: Files) -> Call:
    """OpenVINO's own operations in bfloat16; nodes in float32."""
    run, _, library = ENGINES["OpenVINO"]
    outputs = {"out": torch.empty(data.truth[0].shape)}
    model = data.with_nodes if with_nodes else data.stock_dynamo
    call = run(model, {"x": data.x}, outputs, "bf16", str(library()) if with_nodes else None)
    return lambda: tuple(call().values())


def _narrow_gate(data: Files, results: Any) -> Accuracy:
    return replace(modules.gate(data, results), allowed=GATE[torch.bfloat16])


def make_narrow_case(case: ModuleCase) -> Case:
    stock = Candidate("OpenVINO", EXPORTS[1], Role.PEER, partial(_narrow, False), _narrow_gate)
    return Case(
        name=case.name,
        dtype=torch.bfloat16,
        sizes=case.sizes,
        work=modules.NO_FLOOR,
        candidates=(
            stock,
            Candidate(ours("OpenVINO"), "NCHW", Role.OURS, partial(_narrow, True), _narrow_gate),
            replace(stock, name="OpenVINO (again)", role=Role.CHECK),
        ),
        prepare=partial(_files, case),
    )


# --- sessions -------------------------------------------------------------------------------------------------------


def _create(engine: str, with_nodes: bool, data: Files) -> Call:
    """Creates a session, which is all that is timed."""
    _, create, library = ENGINES[engine]
    model = (data.with_nodes if with_nodes else data.stock_dynamo).SerializeToString()
    more = {"library": str(library())} if with_nodes else {}
    return lambda: create(model, **more)


def _no_gate(_: Any, result: Any) -> Accuracy:
    return Accuracy(0.0, 0.0)


def make_session_case(model: str, engine: str) -> Case:
    case = model_case(model, model, 1, 224, 224)
    return Case(
        name=f"{model}, {engine}",
        dtype=torch.float32,
        sizes=case.sizes,
        work=modules.NO_FLOOR,
        candidates=(
            Candidate(engine, EXPORTS[1], Role.PEER, partial(_create, engine, False), _no_gate),
            Candidate(ours(engine), "NCHW", Role.OURS, partial(_create, engine, True), _no_gate),
            Candidate(f"{engine} (again)", EXPORTS[1], Role.CHECK, partial(_create, engine, False), _no_gate),
        ),
        prepare=partial(_files, case),
    )


# --- single nodes ---------------------------------------------------------------------------------------------------


class _Call(nn.Module):
    """A call of an operator's public function, with its weights."""

    def __init__(self, operator: str, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.operator = OPERATORS[operator]
        self.rest = arguments[self.operator.signature.num_activations :]

    def forward(self, *activations: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.operator(*activations, *self.rest)
        return out


@dataclass(frozen=True)
class OperatorFiles:
    """The exports of a call, and its truth."""

    operator: str
    sizes: Mapping[str, Any]

    @cached_property
    def arguments(self) -> list[Any]:
        return testing.make_arguments(OPERATORS[self.operator], self.sizes)

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {f"x{i}": t for i, t in enumerate(self.arguments[: OPERATORS[self.operator].signature.num_activations])}

    @cached_property
    def truth(self) -> torch.Tensor:
        out: torch.Tensor = OPERATORS[self.operator].plain(*self.arguments)
        return out

    def exported(self, operators: Any) -> Any:
        call = _Call(self.operator, self.arguments)
        names: dict[str, Any] = {"input_names": list(self.inputs), "output_names": ["out"]}
        return effattn.export.to_onnx(call, tuple(self.inputs.values()), operators=operators, **names).model


def _operator_call(engine: str, with_nodes: bool, data: OperatorFiles) -> Call:
    run, _, library = ENGINES[engine]
    outputs = {"out": torch.empty(data.truth.shape)}
    model = data.exported([data.operator] if with_nodes else "standard")
    call: Call = run(model, data.inputs, outputs, library=str(library()) if with_nodes else None)
    return call


def _operator_gate(data: OperatorFiles, result: Any) -> Accuracy:
    error = tolerance.error(result["out"], data.truth.double()) / torch.linalg.vector_norm(data.truth).item()
    return Accuracy(error, GATE[torch.float32])


def make_operator_case(engine: str, operator: str, text: str, sizes: Mapping[str, Any]) -> Case:
    stock = Candidate(engine, "standard operators", Role.PEER, partial(_operator_call, engine, False), _operator_gate)
    return Case(
        name=f"{operator} {text}, {engine}",
        dtype=torch.float32,
        sizes={name: size for name, size in sizes.items() if isinstance(size, int)},
        work=Work(bytes=0, flops=0),
        candidates=(
            stock,
            Candidate(ours(engine), "a node", Role.OURS, partial(_operator_call, engine, True), _operator_gate),
            replace(stock, name=f"{engine} (again)", role=Role.CHECK),
        ),
        prepare=partial(OperatorFiles, operator, sizes),
    )
