"""``python -m effattn``: what serves here, and models of timm as ONNX files."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

import effattn
from effattn import _library, registry


def _instruction_sets() -> list[str]:
    if _library._C is None:
        return []
    lines = ["instruction sets of the cpu backend:"]
    for row in _library._C.isas():
        if not row["supported"]:
            state = f"not on this processor, needs {row['needs']}"
        elif row["test_only"]:
            state = "for tests only, never picked"
        else:
            state = "available"
        lines.append(f"  {row['name']:<10} {row['lanes']:>2} floats a vector  {state}")
    try:
        in_use = _library._C.active_isa()
    except RuntimeError as error:  # EFFATTN_CPU_ISA asks for what is not there
        in_use = f"none: {error}"
    lines.append(f"  in use: {in_use} (EFFATTN_CPU_ISA overrides)")
    return lines


def _failed() -> list[str]:
    """The kernels for which the next backend serves."""
    found = registry.failed()
    if not found:
        return []
    lines = [
        "kernels that failed when they were tried on this GPU, for which the next backend serves "
        f"({registry.verdict_file()}; EFFATTN_VERDICTS overrides):"
    ]
    return lines + [f"  {v.backend:<10} {v.operator}, {v.text()}" for v in found]


def _engines() -> str:
    """Those whose models may have effattn's nodes, by the installed version."""
    found = []
    for name in ("onnxruntime", "openvino"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
    return f"engines for exported models: {', '.join(found)}"


def info() -> str:
    """The text of ``python -m effattn info``."""
    lines = [
        f"effattn {effattn.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads",
        "backends, in the order in which they are asked (EFFATTN_BACKEND overrides):",
    ]
    for backend in registry.backends():
        lines.append(f"  {backend.name:<10} {'available' if backend.available else backend.reason}")
    lines.append(f"  {registry.explain_order()}")
    for device, serving in registry.explain_devices().items():
        said = (f"{name} {', '.join(reasons) or 'serves'}" for name, reasons in serving.items())
        lines.append(f"  {device}: {'; '.join(said) or 'no kernels'}")
    lines += _failed()
    lines += _instruction_sets()
    lines.append(_engines())
    if _library._C is not None:
        build = _library._C.build
        lines.append(f"built with {build['compiler']} against torch {build['torch']} (stable ABI)")
    if _library.cuda_error is None:
        archs = ", ".join(_library.cuda_archs) or "the host"
        lines.append(f"CUDA kernels compiled with {_library.cuda_compiler} for {archs} (EFFATTN_CUDA_ARCHS)")
    return "\n".join(lines)


#: Dimensions of an image that ``export --dynamic`` may free.
_DIMENSIONS = {"batch": 0, "height": 2, "width": 3}


def export(arguments: argparse.Namespace) -> str:
    """Exports a model of timm; returns what was made. SystemExit with the reason if it cannot be."""
    from effattn.export import to_onnx
    from effattn.testing import import_timm

    try:
        timm = import_timm()
    except ImportError as error:
        raise SystemExit(f"effattn export: needs timm ({error}): pip install timm") from error
    checkpoint = arguments.checkpoint
    if checkpoint is not None and not checkpoint.is_file():
        raise SystemExit(f"effattn export: --checkpoint: there is no file {checkpoint}")
    try:
        of_checkpoint = {} if checkpoint is None else {"checkpoint_path": str(checkpoint)}
        model = timm.create_model(arguments.model, pretrained=arguments.pretrained, **of_checkpoint)
    except (RuntimeError, OSError, ValueError) as error:
        raise SystemExit(f"effattn export: {arguments.model}: {error}") from error
    channels, *size = model.pretrained_cfg["input_size"]
    example = torch.zeros(arguments.batch, channels, *(arguments.size or size))
    path = arguments.output or Path(f"{arguments.model}.onnx")
    operators = arguments.operators
    if operators not in ("effattn", "standard"):
        operators = operators.split(",")
    try:
        exported = to_onnx(
            model,
            example,
            path,
            operators=operators,
            dynamic=[{_DIMENSIONS[name]: name for name in arguments.dynamic}],
            input_names=["image"],
            output_names=["output"],
        )
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"effattn export: {error}") from error
    are_random = not arguments.pretrained and checkpoint is None
    return f"{exported}" + ("\nweights are random: --pretrained or --checkpoint FILE for others" if are_random else "")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _dimensions(text: str) -> list[str]:
    """ "batch" or "batch,height,width"."""
    names = text.split(",")
    if not set(names) <= set(_DIMENSIONS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(_DIMENSIONS)}, got {text!r}")
    return names


def _size(text: str) -> tuple[int, int]:
    """ "224" or "1024x2048"."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"expected rows and columns, as 224 or 1024x2048, got {text!r}")
    return int(sides[0]), int(sides[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m effattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print backends, instruction sets and build facts")
    path = commands.add_parser(
        "library",
        help="print the path of the library for an engine",
        description="Prints the path of the library that makes an engine know effattn's nodes; compiles OpenVINO's.",
    )
    path.add_argument("engine", choices=["onnxruntime", "openvino"])
    of = commands.add_parser(
        "export",
        help="write a model of timm as an ONNX file",
        description="Writes a model of timm as an ONNX file, for onnxruntime and OpenVINO with effattn's nodes.",
    )
    of.add_argument("model", help="timm's name, as efficientvit_b1")
    of.add_argument("-o", "--output", type=Path, help="the file; default MODEL.onnx")
    of.add_argument("--size", type=_size, help="of the image, as 224 or 1024x2048; default the model's")
    of.add_argument("--batch", type=_count, default=1, help="images; default 1")
    of.add_argument(
        "--dynamic", type=_dimensions, default=[], help="dimensions of any size: batch, or batch,height,width"
    )
    of.add_argument(
        "--operators",
        default="effattn",
        help="effattn (the default): nodes of effattn where they are faster; standard: none; or names, with commas",
    )
    of.add_argument("--pretrained", action="store_true", help="timm's weights, which it downloads")
    of.add_argument("--checkpoint", type=Path, help="a file of weights")
    return parser


def library(engine: str) -> str:
    """The path of what makes an engine know effattn's nodes. SystemExit with the reason if there is none."""
    try:
        found = {"onnxruntime": effattn.onnxruntime, "openvino": effattn.openvino}[engine].library()
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"effattn library: {error}") from error
    return str(found)


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    if given.command == "info":
        print(info())
    elif given.command == "library":
        print(library(given.engine))
    else:
        print(export(given))


if __name__ == "__main__":
    main()
