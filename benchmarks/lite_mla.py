"""LiteMLA as a whole, its peers, and whole models: formulations, inputs, gates and lists of candidates.

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
from benchmarks.runner import Accuracy, Call, Candidate, Case, Role
from effattn import _library, testing

OURS = "effattn"
STOCK = "stock eager"
CHECK = f"{STOCK} (again)"
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
#: Relative error (norm): far above the rounding of a whole model, far below any mistake.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class LiteMLACase:
    """A module of a real model and the image that reaches it."""

    name: str
    batch: int
    channels: int
    dim: int
    height: int
    width: int

    def module(self) -> nn.Module:
        testing.import_timm()
        from timm.models.efficientvit_mit import LiteMLA

        return LiteMLA(self.channels, self.channels, dim=self.dim, norm_layer=(None, nn.BatchNorm2d))

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.height, self.width

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "batch": self.batch,
            "channels": self.channels,
            "dim": self.dim,
            "height": self.height,
            "width": self.width,
        }

    def work(self, training: bool) -> Work:
        """The arithmetic of the four convolutions and the attention, and its bytes: x, the output, the weights."""
        if _library._C is None:
            raise RuntimeError(f"the compiled library of effattn cannot be loaded: {_library.error}")
        c, d, tokens = self.channels, self.dim, self.batch * self.height * self.width
        heads, kernels = c // d, (5,)
        aggregation = _library._C.multi_scale_plan(
            batch=self.batch, heads=heads, head_dim=d, height=self.height, width=self.width, kernels=kernels
        )["flops_aggregation"]
        groups = self.batch * heads * (1 + len(kernels))
        attention = _library._C.relu_linear_attention_plan(
            groups=groups,
            queries=self.height * self.width,
            keys=self.height * self.width,
            head_dim=d,
            value_dim=d,
            dtype="float32",
        )["flops_forward"]
        projections = 3 * c * c + (1 + len(kernels)) * c * c
        flops = aggregation + attention + 2 * tokens * projections
        passes = 3 if training else 1  # a gradient of the inputs and one of the weights cost a forward pass each
        return Work(bytes=4 * passes * (2 * tokens * c + projections), flops=passes * flops)


@dataclass(frozen=True)
class ModelCase:
    """A whole model of timm."""

    name: str
    model: str
    batch: int
    height: int
    width: int

    def module(self) -> nn.Module:
        return testing.import_timm().create_model(self.model)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, 3, self.height, self.width

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "height": self.height, "width": self.width}

    def work(self, training: bool) -> Work:
        return Work(bytes=0, flops=0)  # no floor: most of it is none of ours


@dataclass(frozen=True)
class DCAEBlockCase:
    """A block of diffusers' deep compression autoencoder (arXiv 2410.10733): the attention and a gated MBConv."""

    name: str
    batch: int
    channels: int
    dim: int
    height: int
    width: int

    def module(self) -> nn.Module:
        testing.import_diffusers()
        from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock

        return EfficientViTBlock(self.channels, attention_head_dim=self.dim, norm_type="rms_norm")

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.height, self.width

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "channels": self.channels, "height": self.height, "width": self.width}

    def work(self, training: bool) -> Work:
        return Work(bytes=0, flops=0)  # no floor: the convolutions are none of ours


AnyCase = LiteMLACase | ModelCase | DCAEBlockCase


@dataclass
class Inputs:
    """A module, its input and the truth in float64."""

    case: AnyCase
    training: bool = False

    @cached_property
    def module(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.case.module()
        testing.randomise_batch_norm(module)
        return module.train(self.training)

    @cached_property
    def x(self) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.randn(self.case.input_shape)

    @cached_property
    def grad_out(self) -> torch.Tensor:
        torch.manual_seed(2)
        return torch.randn(self.case.input_shape)

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
        testing.error(result, truth) / torch.linalg.vector_norm(truth).item()
        for result, truth in list(zip(results, data.truth, strict=False))[:2]
    ]
    return Accuracy(max(errors), TOLERANCE * (10 if data.training else 1))


# --- candidates -----------------------------------------------------------------------------------------


def _prepared(data: Inputs, memory_format: torch.memory_format, accelerated: bool) -> nn.Module:
    module = copy.deepcopy(data.module).to(memory_format=memory_format)
    if accelerated and not effattn.accelerate(module).replaced:
        raise RuntimeError("accelerate() replaced nothing")
    return module


def torch_call(memory_format: torch.memory_format, accelerated: bool, compiled: bool, data: Inputs) -> Call:
    module: Any = _prepared(data, memory_format, accelerated)
    if compiled:
        options = None if data.training else {"freezing": True}
        module = torch.compile(module, fullgraph=True, dynamic=False, options=options)
    x = data.x.to(memory_format=memory_format)
    return step(module, x, data.grad_out.to(memory_format=memory_format) if data.training else None)


def _onnx(data: Inputs) -> Any:
    import onnx

    file = io.BytesIO()
    with warnings.catch_warnings():  # of constants that are left to the runtimes, which fold them
        warnings.simplefilter("ignore")
        if isinstance(data.case, DCAEBlockCase):  # the older exporter writes movedim() as what no runtime takes
            program = torch.onnx.export(data.module, (data.x,), dynamo=True, input_names=["x"], output_names=["out"])
            program.save(file)
        else:
            torch.onnx.export(
                data.module, (data.x,), file, dynamo=False, input_names=["x"], output_names=["out"], opset_version=17
            )
    return onnx.load_from_string(file.getvalue())


def _runtime_call(run: Callable[..., Callable[[], peers.Tensors]], data: Inputs) -> Call:
    with torch.no_grad():
        outputs = {"out": torch.empty(data.module(data.x).shape)}
    call = run(_onnx(data), {"x": data.x}, outputs)
    return lambda: tuple(call().values())


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


def runtime_candidates() -> list[Candidate]:
    return [
        Candidate(name, "NCHW", Role.PEER, partial(_runtime_call, run), gate)
        for name, run in (("onnxruntime", peers.onnxruntime_call), ("OpenVINO", peers.openvino_call))
    ]


def check_candidate() -> Candidate:
    return Candidate(CHECK, "NCHW", Role.CHECK, partial(torch_call, FORMATS["NCHW"], False, False), gate)


def make_case(case: AnyCase, training: bool = False) -> Case:
    return Case(
        name=case.name,
        dtype=torch.float32,
        sizes=case.sizes,
        work=case.work(training),
        candidates=(
            *torch_candidates(accelerated=False, compiled=False),
            *torch_candidates(accelerated=False, compiled=True),
            *([] if training else runtime_candidates()),
            *torch_candidates(accelerated=True, compiled=False),
            *torch_candidates(accelerated=True, compiled=True),
            check_candidate(),
        ),
        prepare=partial(Inputs, case, training),
        training=training,
    )
