"""What every operator must do on every backend: here the tests run on the backends for GPUs that there are, on a GPU,
interpreted or emulated, and otherwise on each instruction set of the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from gpu_backends import HERE, device_of
from specified import REPRESENTATIVES

from effattn import _library, use_backend
from effattn.backends import cpu, cuda
from effattn.backends.triton import LAUNCHERS, NAMESPACE

_C = _library._C
ISAS = {row["name"]: row["supported"] for row in _C.isas()}
#: By backend, the operators that it has kernels for.
KERNELS = {"cpu": cpu.OPERATORS, "cuda": cuda.OPERATORS, "triton": LAUNCHERS}


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic


class Target(NamedTuple):
    """What a test runs on."""

    backend: str
    device: torch.device
    #: The namespace of its torch operators.
    ops: Any


@pytest.fixture(params=HERE or ISAS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each instruction set, or each backend for GPUs, in use for the test."""
    if request.param in HERE:
        namespace = NAMESPACE if request.param == "triton" else "effattn"
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # or convolutions of what is compared with are off by 1e-3
        with use_backend(request.param):
            yield Target(request.param, device_of(request.param), getattr(torch.ops, namespace))
        torch.backends.cudnn.allow_tf32 = before
        return
    if not ISAS[request.param]:
        pytest.skip(f"this processor has no {request.param} (its logic runs as avx2_wide)")
    isa = _C.active_isa()
    _C.set_isa(request.param)
    with use_backend("cpu"):
        yield Target("cpu", torch.device("cpu"), torch.ops.effattn)
    _C.set_isa(isa)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out what no backend here has: an operator or a dtype; and beside a backend for GPUs what is the CPU's.

    Kernels for GPUs are slow where they are interpreted or emulated: the short tier takes each value of the parameters,
    of what is not marked every_case an operator's first case, and of what is marked registration the representatives.
    """
    is_short = bool(HERE) and not config.getoption("--full")
    taken = [item for item in items if not _is_of_conformance(item) or _has_kernels(item)]
    if is_short:
        taken = [item for item in taken if not _is_of_conformance(item) or _is_first(item)]
    kept = set(taken)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = taken
    for item in items:
        if _is_of_conformance(item):
            item.add_marker(pytest.mark.emulated)
            if is_short:
                item.add_marker(pytest.mark.each_value)


def _is_of_conformance(item: pytest.Item) -> bool:
    return item.path.parent.name == "conformance"


def _is_first(item: Any) -> bool:
    values = item.callspec.params
    return item.get_closest_marker("every_case") is not None or (
        ("case" not in values or values["case"] == values["operator"].cases[0])
        and (item.get_closest_marker("registration") is None or _represents(values))
    )


def _represents(values: Any) -> bool:
    return values["operator"].name in REPRESENTATIVES and values.get("order", "first") == "first"


def _has_kernels(item: Any) -> bool:
    values = item.callspec.params if hasattr(item, "callspec") else {}
    if HERE and "target" not in values:
        return False
    operator, dtype = values.get("operator"), values.get("dtype", torch.float32)
    if operator is None:
        return True
    target = values.get("target")
    backend = target if target in HERE else "cpu"
    return operator.name in KERNELS[backend] and dtype in operator.dtypes


@pytest.fixture
def examples(request: pytest.FixtureRequest) -> int:
    """How many random arguments are tried; fewer where kernels are interpreted or emulated."""
    is_full = request.config.getoption("--full")
    return (1_000 if is_full else 6) if HERE else (10_000 if is_full else 100)
