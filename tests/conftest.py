"""Fixtures for all tests. No model library and no compiler is needed by what stands here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

import effattn  # noqa: F401  (a broken installation should fail here, once)
from effattn import _library

if _library._C is None:
    raise RuntimeError(f"the compiled library is missing: {_library.error}")

_C = _library._C

# pytest -n puts a process on every core: threads of several would wait for each other, spinning. Tests of
# threads ask for theirs.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


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
    if not next(row["supported"] for row in _C.isas() if row["name"] == request.param):
        pytest.skip(f"this processor has no {request.param}; its logic runs as avx2_wide")
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
