"""A plugin of pytest for a run on a GPU: ``-p benchmarks.gpu.pytest_plugin``.

Tells of each test as it is done; leaves out what another process has done already; ends the process at an error after
which no kernel runs, so that the rest is done by another one. A test that fails is shown at once.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import child, names
from benchmarks.gpu.lines import Status

#: Tests of this backend alone, or, of the first one, those of none as well.
BACKEND_VARIABLE = "EFFATTN_TESTED_BACKEND"
#: "i/n": every n-th test, from the i-th on.
SHARD_VARIABLE = "EFFATTN_TEST_SHARD"
#: A list of [operator, backend] whose kernels end processes.
QUARANTINE_VARIABLE = "EFFATTN_QUARANTINE"

_done = child.start()
_failed: dict[str, tuple[Status, str]] = {}
_seconds: dict[str, float] = defaultdict(float)


def _backend_of(item: pytest.Item) -> str:
    params = _params(item)
    backend = params.get("backend", params.get("target"))
    return backend if backend in names.BACKENDS else names.BACKENDS[0]


def _params(item: pytest.Item) -> Mapping[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _is_of(item: pytest.Item, operator: str, backend: str) -> bool:
    """A test is of the operator that it gets. Or its file has that name, or what the names of several begin with."""
    given = getattr(_params(item).get("operator"), "name", None)
    is_of_file = operator.startswith(Path(item.location[0]).stem.removeprefix("test_"))
    return _backend_of(item) == backend and (is_of_file if given is None else given == operator)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = os.environ.get(BACKEND_VARIABLE)
    index, count = map(int, os.environ.get(SHARD_VARIABLE, "0/1").split("/"))
    quarantine = [tuple(pair) for pair in json.loads(os.environ.get(QUARANTINE_VARIABLE, "[]"))]
    mine = [item for item in items if backend in (None, _backend_of(item))][index::count]
    kept, left_out = [], defaultdict(list)
    for item in mine:
        pair = next((pair for pair in quarantine if _is_of(item, *pair)), None)
        (kept if pair is None else left_out[pair]).append(item)
    for (operator, of), tests in left_out.items():
        name = f"tests of {operator}: {of}, part {index + 1} of {count}"
        if name not in _done:
            child.finish(name, Status.SKIPPED, reason=f"{len(tests)} tests: its kernels are quarantined")
    child.plan([item.nodeid for item in kept])
    items[:] = [item for item in kept if item.nodeid not in _done]


def pytest_runtest_logstart(nodeid: str) -> None:
    child.begin(nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    _seconds[item.nodeid] += call.duration
    if report.skipped and report.when in ("setup", "call"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _failed.setdefault(item.nodeid, (Status.SKIPPED, reason))
    elif report.failed:
        error = call.excinfo.value if call.excinfo is not None else None
        status = Status.WRONG if isinstance(error, AssertionError) and report.when == "call" else Status.ERROR
        _failed[item.nodeid] = status, " ".join(str(error).split())[:300]
        terminal = item.config.pluginmanager.getplugin("terminalreporter")
        terminal.write_line(f"\n{item.nodeid}, {report.when}:\n{report.longreprtext}")
        if error is not None and child.is_sticky(error):
            _tell(item.nodeid)
            terminal.flush()
            os._exit(child.STICKY)  # without teardown: what is on the GPU is beyond being freed
    if report.when == "teardown":
        _tell(item.nodeid)
    return report


def _tell(nodeid: str) -> None:
    status, reason = _failed.pop(nodeid, (Status.OK, None))
    child.finish(
        nodeid, status, seconds=round(_seconds.pop(nodeid), 3), **({} if reason is None else {"reason": reason})
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What failed has been told; the process itself did what it should."""
    if session.exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.OK
