"""Tiers, skips and fixtures of all tests. No model library and no compiler is needed by what stands here.

Without ``--full`` a run is the short tier: tests marked ``full`` or ``slow`` stay out, and those marked ``pairwise``
run on combinations in which each pair of parameters occurs. With ``--strict-tools``, which CI=true implies, a skip for
want of a tool is a failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import skips
import swept
import tiers
import torch

import effattn  # noqa: F401  (a broken installation should fail here, once)
from effattn import _library

if _library._C is None:
    raise RuntimeError(f"the compiled library is missing: {_library.error}")

_C = _library._C

collect_ignore = ["toy_operator"]  # a part of another tree (test_add_an_operator.py)
UNSUPPORTED = {row["name"] for row in _C.isas() if not row["supported"]}

# pytest -n puts a process on every core: threads of several, and of what they start, would wait for each other,
# spinning. Tests of threads ask for theirs.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full tier: every test, on every combination")
    strict = os.environ.get("CI") == "true"
    parser.addoption("--strict-tools", action="store_true", default=strict, help="a tool that is missing is a failure")


def pytest_configure(config: pytest.Config) -> None:
    swept.is_full = config.getoption("--full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out what is the full tier's."""
    if config.getoption("--full"):
        return
    taken = {id(item) for item in items if not (item.get_closest_marker("full") or item.get_closest_marker("slow"))}
    by_function: dict[tuple[str, int], list[Any]] = {}
    for item in items:
        if id(item) in taken and hasattr(item, "callspec") and (strength := _strength(item)):
            by_function.setdefault((item.nodeid.split("[")[0], strength), []).append(item)
    for (_, strength), group in by_function.items():
        # What this processor would skip covers nothing; one of them stays, to say so.
        skipped = [item for item in group if UNSUPPORTED & set(map(item.callspec.params.get, ("isa", "target")))]
        runs, skipped = [item for item in group if item not in skipped], skipped[:1]
        # A value is the same object in all combinations, and need not be hashable.
        chosen = tiers.cover([tuple(map(id, item.callspec.params.values())) for item in runs], strength)
        taken -= {id(item) for item in group} - {id(item) for item in (*skipped, *(runs[i] for i in chosen))}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in taken])
    items[:] = [item for item in items if id(item) in taken]


def _strength(item: pytest.Item) -> int:
    """How many parameters together have all their combinations; 0 for all parameters."""
    if item.get_closest_marker("each_value"):
        return 1
    marker = item.get_closest_marker("pairwise")
    return 2 if marker is not None and marker.args != (False,) else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if item.config.getoption("--strict-tools"):
        skips.judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    if collector.config.getoption("--strict-tools"):
        skips.judge(report)
    return report


@pytest.fixture(scope="session", autouse=True)
def fresh_compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A graph that torch.compile kept from an earlier build holds the strides of that build's fake kernels."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))
    yield
    if before is None:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same numbers, whichever tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """What other tests compiled counts towards torch.compile's recompile_limit of a `forward`; beyond it the
    code runs uncompiled, and fullgraph=True fails."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(params=[row["name"] for row in _C.isas()])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set compiled in, in use for the test."""
    if request.param in UNSUPPORTED:
        pytest.skip(f"this processor has no {request.param} (its logic runs as avx2_wide)")
    before = _C.active_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def poisoned_allocations() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element that is never written cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
