"""Models as ONNX files, for onnxruntime, OpenVINO and others: with effattn's operators as nodes, or without.

The exporter is torch's (``torch.onnx.export`` by way of ``torch.export``); it needs the packages onnx and onnxscript.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import effattn
from effattn import _library
from effattn import nn as ours
from effattn._tracing import keeping_nodes
from effattn.export._blocks import FrozenBlock, freeze
from effattn.export._frozen import freeze_cascades
from effattn.integrations import accelerate_attention
from effattn.ops._nodes import DOMAIN

if TYPE_CHECKING:
    import onnx

#: The operator whose nodes ``operators="effattn"`` does without. The others are faster than standard operators at every
#: size that was measured, in both engines (docs/benchmarks.md). This one is not, and takes copies of q, k and v in a
#: model, which engines' products do without.
_SLOWER = "biased_attention"
#: The modules that are made of it: stock ones in a file unless its nodes are asked for.
_SOFTMAX = (ours.EfficientFormerAttention, ours.EfficientFormerV2Attention, ours.EfficientFormerV2AttentionDownsample)
#: The newest that onnxruntime 1.17 reads, with its version of the file format.
OPSET, IR_VERSION = 20, 9
#: torch exports one model at a time.
_LOCK = threading.Lock()
#: Of the exporter, about what is its own business.
_EXPORTERS_WARNINGS = (FutureWarning, DeprecationWarning, UserWarning)


@dataclass(frozen=True)
class Exported:
    """What :func:`to_onnx` made.

    Attributes:
        model: the ``onnx.ModelProto``; without weights where they are in a file beside ``path``.
        path: of the file; None if there is none.
        nodes: how many nodes of each of effattn's operators it has.
        reason: why it has none, where it has none.
    """

    model: onnx.ModelProto = field(repr=False)
    path: Path | None
    nodes: Mapping[str, int]
    reason: str = ""

    def __str__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        if not self.nodes:
            return f"effattn.export: {where}, standard operators alone: {self.reason}"
        kept = ", ".join(f"{count} {name}" for name, count in self.nodes.items())
        return f"effattn.export: {where}, with nodes of effattn: {kept}"


def to_onnx(
    model: nn.Module,
    example: torch.Tensor | Sequence[torch.Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    operators: str | Sequence[str] = "effattn",
    dynamic: Sequence[Mapping[int, str] | None] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = OPSET,
) -> Exported:
    """Exports a model for inference to ONNX.

    The model stays as it is, accelerated or not: what is exported is a copy of it in evaluation mode, which shares its
    weights.

    Args:
        model: any module.
        example: its inputs.
        path: of the file that is written; weights of more than 2 GB go into a second one beside it. None for no file.
        operators: "effattn": attention that effattn knows becomes nodes of the domain "effattn", where that is faster;
            :mod:`effattn.onnxruntime` and :mod:`effattn.openvino` run them. "standard": standard operators alone, for
            any runtime. Or names of the operators that become nodes, whatever their speed. Nodes are float32's.
        dynamic: for each input, names of the dimensions that may have any size: ``[{0: "batch"}]``.
        input_names, output_names: of the graph; by default torch's.
        opset: of the standard operators.

    Returns:
        What was made; ``print`` it.

    Raises:
        ValueError: for operators that there are not, or names of another number than inputs.
        TypeError: for a model that is none, or an example that is no tensor and no sequence of tensors.
        OSError: for a folder that there is not, or a file that cannot be written.
        RuntimeError: if the compiled library is missing.
        ImportError: without the packages onnx and onnxscript.
    """
    kept = _kept(operators)
    inputs = _checked_inputs(model, example)
    _check_dynamic(dynamic)
    for name, given in (("dynamic", dynamic), ("input_names", input_names)):
        if given is not None and len(given) != len(inputs):
            raise ValueError(f"{name}: expected one for each of {len(inputs)} inputs, got {len(given)}")
    for i, (t, dims) in enumerate(zip(inputs, dynamic or (), strict=False)):
        for dim in dims or ():
            if not 0 <= dim < t.dim():
                raise ValueError(f"dynamic: expected a dimension of input {i}, of shape {tuple(t.shape)}, got {dim}")
    try:
        import onnx
        import onnxscript  # noqa: F401  (of torch's exporter: said here, before it fails in its middle)
    except ImportError as error:
        raise ImportError(f"effattn.export needs the packages onnx and onnxscript ({error})") from error
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {Path(path).absolute().parent}")
    if path is not None and Path(path).is_dir():
        raise IsADirectoryError(f"path: expected a file, got the folder {path}")
    prepared = _prepared(model, kept)

    refused: dict[str, None] = {}

    def keeps(operator: str, activations: Sequence[torch.Tensor]) -> bool:
        if operator in kept and activations[0].dtype != torch.float32:
            refused[f"nodes are float32's, its attention computes in {activations[0].dtype}"] = None
        return operator in kept and all(t.dtype == torch.float32 for t in activations)

    with _LOCK, torch.no_grad(), _without_autocast(inputs), keeping_nodes(keeps), _quiet():
        program = torch.onnx.export(
            prepared,
            _large_enough(inputs, dynamic),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=None if dynamic is None else tuple(dict(dims or {}) for dims in dynamic),
            input_names=input_names,
            output_names=output_names,
            verbose=False,
        )
    assert program is not None
    graph = program.model
    _clean(graph)
    graph.ir_version = IR_VERSION
    graph.metadata_props["effattn"] = effattn.__version__
    nodes = Counter(node.op_type for node in _all_nodes(graph) if node.domain == DOMAIN)
    reason = "" if nodes else _why_none(prepared, kept, refused)
    if path is None:
        onnx.checker.check_model(program.model_proto, full_check=True)
        return Exported(program.model_proto, None, nodes, reason)
    written = _written(program, Path(path))
    onnx.checker.check_model(os.fspath(written), full_check=True)
    return Exported(onnx.load(written, load_external_data=False), written, nodes, reason)


def _why_none(prepared: nn.Module, kept: frozenset[str], refused: Mapping[str, None]) -> str:
    if not kept:
        return "as asked for"
    if refused:
        return "; ".join(refused)
    if _SLOWER not in kept and accelerate_attention(prepared).replaced:
        return f"its attention is {_SLOWER}, whose nodes are no faster in a model; operators=[{_SLOWER!r}] has them"
    return (
        "no attention that effattn knows was recorded: there is none, it has hooks, adapters or other norms, or torch "
        "traced it in a way of its own, as it does inside of torch.cond"
    )


def _all_nodes(model: Any) -> Iterator[Any]:
    """Those of subgraphs and functions too."""
    from onnx_ir.traversal import RecursiveGraphIterator

    for graph in (model.graph, *model.functions.values()):
        yield from RecursiveGraphIterator(graph)


def _checked_inputs(model: Any, example: Any) -> tuple[torch.Tensor, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inputs = (example,) if isinstance(example, torch.Tensor) else example
    if not isinstance(inputs, (list, tuple)) or not all(isinstance(t, torch.Tensor) for t in inputs):
        raise TypeError(f"example: expected a tensor or a sequence of tensors, got {type(example).__name__}")
    return tuple(inputs)


def _without_autocast(inputs: Sequence[torch.Tensor]) -> contextlib.ExitStack:
    """A file holds the model, not what surrounds the call that exports it."""
    stack = contextlib.ExitStack()
    for device in {"cpu", *(t.device.type for t in inputs)}:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _kept(operators: str | Sequence[str]) -> frozenset[str]:
    if operators == "standard":
        return frozenset()
    if _library.error is not None:
        raise RuntimeError(f"effattn.export: the compiled library cannot be loaded ({_library.error})")
    known = _library.node_operators()
    if operators == "effattn":
        return frozenset(known) - {_SLOWER}
    if isinstance(operators, str) or not set(operators) <= set(known):
        raise ValueError(f'operators: expected "effattn", "standard" or names among {known}, got {operators!r}')
    return frozenset(operators)


def _check_dynamic(dynamic: Any) -> None:
    expected = 'dynamic: expected a list with one entry for each input, such as [{0: "batch"}] or [None]'
    if dynamic is None:
        return
    if not isinstance(dynamic, (list, tuple)):
        raise TypeError(f"{expected}, got {type(dynamic).__name__}")
    for dims in dynamic:
        if dims is not None and not isinstance(dims, Mapping):
            raise TypeError(f"{expected}, got {dims!r} in it")
        for dim, name in (dims or {}).items():
            if type(dim) is not int or not isinstance(name, str):
                raise TypeError(f"{expected}, got {dims!r} in it")


def _prepared(model: nn.Module, kept: frozenset[str]) -> nn.Module:
    """A copy with the same weights, in evaluation mode, accelerated.

    Without nodes too: of the stock formulation of linear attention an exporter drops eps, and 0 / 0 is left.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # weights that weight_norm and the like have computed, which cannot be copied
        shared |= {id(t): t.detach() for t in module.__dict__.values() if isinstance(t, torch.Tensor) and not t.is_leaf}
    prepared = copy.deepcopy(model, shared)
    prepared.eval()  # of some of timm's modules it returns nothing
    accelerate_attention(prepared)
    if _SLOWER not in kept:
        for module in list(prepared.modules()):
            if isinstance(module, _SOFTMAX):
                effattn.restore(module)
    if kept:
        freeze_cascades(prepared)
    return prepared


def _large_enough(
    inputs: Sequence[torch.Tensor], dynamic: Sequence[Mapping[int, str] | None] | None
) -> tuple[torch.Tensor, ...]:
    """Inputs whose dynamic dimensions are no 1, which torch.export takes for a constant."""
    made = []
    for t, dims in zip(inputs, dynamic or [None] * len(inputs), strict=True):
        for dim in dims or ():
            if t.shape[dim] == 1:
                t = torch.cat([t, t], dim)
        made.append(t)
    return tuple(made)


def _clean(model: Any) -> None:
    """Weights stored once; nothing of this machine, such as paths in stack traces."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateInitializersPass(size_limit=2**62)(model)
    common.RemoveUnusedOpsetsPass()(model)


def _written(program: Any, path: Path) -> Path:
    """Writes beside the file first: one that was there stays until the new one is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = Path(folder) / path.name
        program.save(whole)
        for part in sorted(Path(folder).iterdir(), key=lambda part: part == whole):  # weights first
            os.replace(part, path.parent / part.name)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in _EXPORTERS_WARNINGS:
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)


__all__ = ["Exported", "FrozenBlock", "freeze", "to_onnx"]
