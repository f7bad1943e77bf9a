"""Modules and whole models, their peers, and what all of their cases share: inputs, gates, lists of candidates.

The stock module is timm's (diffusers' for DC-AE), with random weights and BatchNorm statistics that are not
trivial. Peers get it as it is; effattn gets a copy on which ``accelerate`` was called.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

import effattn
from benchmarks import peers
from benchmarks.floor import Work
from benchmarks.runner import GATE, Accuracy, Call, Candidate, Case, Role
from effattn import testing, tolerance

OURS = "effattn"
STOCK = "stock eager"
CHECK = f"{STOCK} (again)"
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
#: Of a case most of which is none of ours.
NO_FLOOR = Work(bytes=0, flops=0)


@dataclass(frozen=True)
class ModuleCase:
    """A module and the input that it gets.

    Args:
        name: of the case.
        make: returns the module.
        input_shape: of its input.
        sizes: what a results file says of the case.
        work: of a call of inference.
        dynamo_export: whether the older exporter writes something as what no runtime takes.
        is_model: whether it is a whole model.
    """

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    sizes: dict[str, int]
    work: Callable[[], Work] = lambda: NO_FLOOR
    dynamo_export: bool = False
    is_model: bool = False


def model_case(name: str, model: str, batch: int, height: int, width: int) -> ModuleCase:
    """A whole model of timm."""
    sizes = {"batch": batch, "height": height, "width": width}

    def make() -> nn.Module:
        return testing.import_timm().create_model(model)

    return ModuleCase(name, make, (batch, 3, height, width), sizes, is_model=True)


@dataclass
class Inputs:
    """A module, its input and the truth in float64."""

    case: ModuleCase
    training: bool = False

    @cached_property
    def module(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.case.make()
        testing.randomise_batch_norm(module)
        testing.randomise_what_starts_at_zero(module)
        module.train(self.training)  # some of timm's return nothing
        return module

    @cached_property
    def x(self) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.randn(self.case.input_shape)

    @cached_property
    def grad_out(self) -> torch.Tensor:
        torch.manual_seed(2)
        return torch.randn(self.case.input_shape)

    @cached_property
    def onnx_model(self) -> Any:
        """For all runtimes that read ONNX: exporting a whole model takes a while."""
        import onnx

        file = io.BytesIO()
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["out"]}
        with warnings.catch_warnings(action="ignore"):  # of constants that are left to the runtimes, which fold them
            if self.case.dynamo_export:
                torch.onnx.export(self.module, (self.x,), dynamo=True, **names).save(file)
            else:
                torch.onnx.export(self.module, (self.x,), file, dynamo=False, opset_version=17, **names)
        return onnx.load_from_string(file.getvalue())

    @cached_property
    def truth(self) -> tuple[torch.Tensor, ...]:
        """effattn's reference stands in for timm's attention, which computes in float32 whatever comes."""
        module = copy.deepcopy(self.module).double()
        effattn.accelerate(module)
        x, grad_out = self.x.double(), self.grad_out.double() if self.training else None
        return step(module, x, grad_out)()


def step(module: Callable[..., torch.Tensor], x: torch.Tensor, grad_out: torch.Tensor | None) -> Call:
    """A call of inference, or of a training step without the optimiser: output, gradients of input and weights."""
    if grad_out is None:
        return lambda: (module(x),)
    assert isinstance(module, nn.Module)
    leaves = [x.detach().requires_grad_(), *module.parameters()]

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        out = module(leaves[0])
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    return forward_and_backward


def gate(data: Inputs, results: Any) -> Accuracy:
    """The output; for training its gradient of the input too, which all the others go into."""
    errors = [
        tolerance.error(result, truth) / torch.linalg.vector_norm(truth).item()
        for result, truth in list(zip(results, data.truth, strict=False))[:2]
    ]
    return Accuracy(max(errors), GATE[torch.float32] * (10 if data.training else 1))


# --- candidates -----------------------------------------------------------------------------------------


def _prepared(data: Inputs, memory_format: torch.memory_format, accelerated: bool) -> nn.Module:
    module = copy.deepcopy(data.module).to(memory_format=memory_format)
    if accelerated and not effattn.accelerate(module).replaced:
        raise RuntimeError("accelerate() replaced nothing")
    return module


def torch_call(memory_format: torch.memory_format, accelerated: bool, compiled: bool, data: Inputs) -> Call:
    module: Any = _prepared(data, memory_format, accelerated)
    x = data.x.to(memory_format=memory_format)
    if compiled:
        module = peers.compiled_module(module, x)
    return step(module, x, data.grad_out.to(memory_format=memory_format) if data.training else None)


def _onnx_call(run: Callable[..., Callable[[], peers.Tensors]], data: Inputs) -> Call:
    with torch.no_grad():
        outputs = {"out": torch.empty(data.module(data.x).shape)}
    call = run(data.onnx_model, {"x": data.x}, outputs)
    return lambda: tuple(call().values())


def _exported_call(
    run: Callable[..., Callable[[], torch.Tensor]], memory_format: torch.memory_format, data: Inputs
) -> Call:
    x = data.x.to(memory_format=memory_format)
    call = run(_prepared(data, memory_format, accelerated=False), (x,))
    return lambda: (call(),)


def torch_candidates(accelerated: bool, compiled: bool) -> list[Candidate]:
    """In both memory formats."""
    who = OURS if accelerated else "stock"
    name = f"{who} compiled" if compiled else f"{who} eager"
    return [
        Candidate(
            name,
            label,
            Role.OURS if accelerated else Role.PEER,
            partial(torch_call, format_, accelerated, compiled),
            gate,
        )
        for label, format_ in FORMATS.items()
    ]


def runtime_candidates(case: ModuleCase) -> list[Candidate]:
    """Those that read ONNX, and those that torch exports to; TFLite also in its own memory order.

    Not so for whole models, of which that would be three channels of an image: converting takes too long.
    """
    onnx = (("onnxruntime", peers.onnxruntime_call), ("OpenVINO", peers.openvino_call))
    exported = [("TFLite", label, peers.tflite_call) for label in FORMATS] + [
        ("ExecuTorch", "NCHW", peers.executorch_call)
    ]
    return [
        *(Candidate(name, "NCHW", Role.PEER, partial(_onnx_call, run), gate) for name, run in onnx),
        *(
            Candidate(name, label, Role.PEER, partial(_exported_call, run, FORMATS[label]), gate)
            for name, label, run in exported
            if label == "NCHW" or not case.is_model
        ),
    ]


def check_candidate() -> Candidate:
    return Candidate(CHECK, "NCHW", Role.CHECK, partial(torch_call, FORMATS["NCHW"], False, False), gate)


def make_case(case: ModuleCase, training: bool = False) -> Case:
    work, passes = case.work(), 3 if training else 1  # gradients of the inputs and the weights cost a forward pass each
    return Case(
        name=case.name,
        dtype=torch.float32,
        sizes=case.sizes,
        work=Work(passes * work.bytes, passes * work.flops),
        candidates=(
            *torch_candidates(accelerated=False, compiled=False),
            *torch_candidates(accelerated=False, compiled=True),
            *([] if training else runtime_candidates(case)),
            *torch_candidates(accelerated=True, compiled=False),
            *torch_candidates(accelerated=True, compiled=True),
            check_candidate(),
        ),
        prepare=partial(Inputs, case, training),
        training=training,
    )
