"""What is measured on a GPU: the operators in the shapes of real models, from one image to 256, and whole models.

Each operator has a file of its name beside this one, with ``MEASURED`` in it.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable
from functools import partial

import torch

import benchmarks.gpu
import effattn
from benchmarks.floor import Work
from benchmarks.gpu.measured import Measured
from benchmarks.gpu.runner import STOCK, Arguments, GpuCase
from effattn import testing
from effattn.ops import OPERATORS

MODELS = "gpu-models"


def _measured() -> list[Measured]:
    """Those with the most main cases first."""
    files = [module.name for module in pkgutil.iter_modules(benchmarks.gpu.__path__) if module.name in OPERATORS]
    found = [importlib.import_module(f"benchmarks.gpu.{name}").MEASURED for name in files]
    return sorted(found, key=lambda measured: -len(measured.main))


MEASURED = _measured()
#: The operator behind each suite; whole models have none.
OPERATOR_OF = {
    measured.suite + training: measured.operator.name
    for training in ("", "-training")
    for measured in MEASURED
    if measured.shapes
}
#: What the smoke stage tries, by operator and form (`operator_of` in :mod:`benchmarks.gpu.names` tells them apart).
SMOKE = {measured.operator.name + form: measured for measured in MEASURED for form in measured.smoke}
#: Cases that are measured before all others, and those whose kernels a profiler looks at.
MAIN = [name for measured in MEASURED for name in measured.main]
PROFILED = [name for measured in MEASURED for name in measured.profiled]


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
        suite=MODELS,
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


# --- all of them ----------------------------------------------------------------------------------------

#: By suite, its title and its cases.
SUITES: dict[str, tuple[str, Callable[[], list[GpuCase]]]] = {
    measured.suite + suffix: (f"{measured.operator.name}, {title}", partial(measured.cases, training))
    for suffix, title, training in (("", "forward", False), ("-training", "forward and backward", True))
    for measured in MEASURED
    if measured.shapes
} | {MODELS: ("whole models, inference, float16", models)}
#: What the README calls them.
README_TITLES = {
    suite: measured.title + (", training step" if suite != measured.suite else "")
    for measured in MEASURED
    if measured.shapes
    for suite in (measured.suite, f"{measured.suite}-training")
} | {MODELS: "whole model, inference"}


def name_of(case: GpuCase) -> str:
    """As ``MAIN`` has it."""
    return f"{case.suite}: {case.name}, {str(case.dtype).removeprefix('torch.')}"


def smoke(kernel: str, dtype: torch.dtype, training: bool) -> list[GpuCase]:
    """Small cases of one of ``SMOKE``, no multiples of a tile; they take different ways through its kernels.

    Raises:
        ValueError: for an operator that there is not.
    """
    if kernel not in SMOKE:
        raise ValueError(f"operator: expected one of {', '.join(SMOKE)}, got {kernel!r}")
    measured = SMOKE[kernel]
    shapes = measured.smoke[kernel.removeprefix(measured.operator.name)]
    return [measured.case(shape, training, dtype) for shape in shapes]
