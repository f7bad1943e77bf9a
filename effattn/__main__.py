"""``python -m effattn info``: what serves here, and why the rest does not."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence

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
    if _library._C is not None:
        build = _library._C.build
        lines.append(f"built with {build['compiler']} against torch {build['torch']} (stable ABI)")
    if _library.cuda_error is None:
        archs = ", ".join(_library.cuda_archs) or "the host"
        lines.append(f"CUDA kernels compiled with {_library.cuda_compiler} for {archs} (EFFATTN_CUDA_ARCHS)")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m effattn", description=__doc__)
    parser.add_argument("command", choices=["info"], help="print backends, instruction sets and build facts")
    parser.parse_args(arguments)
    print(info())


if __name__ == "__main__":
    main()
