"""What tests of a build of its own share: the package is staged elsewhere, with sanitizers, and pytest runs on that.

The interpreter is not instrumented, so the sanitizers' runtimes are preloaded. Python itself leaks by design, so leaks
are not looked for; everything else aborts the run. Which tests run is said by their markers (pyproject.toml).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = "address,undefined"

# Imports the instrumented package before pytest can put any other folder on the path, so that the build in the
# repository can never be what is tested.
RUN_TESTS = f"""
import sys, effattn._C
build = effattn._C.build
if build["sanitizer"] != "{SANITIZERS}":
    sys.exit(f"staged tests: imported {{effattn._C.__file__}}, a build with {{build['sanitizer'] or 'none'}}")
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def unsupported() -> list[str]:
    """Instruction sets that this processor does not have."""
    return [row["name"] for row in _isas() if not row["supported"]]


def all_but_the_widest() -> list[str]:
    """Instruction sets to leave out where one will do: the widest vectors go furthest beyond the end of a tensor."""
    rows = _isas()
    widest = max((row for row in reversed(rows) if row["supported"]), key=lambda row: row["lanes"])
    return [row["name"] for row in rows if row is not widest]


def _isas() -> list[dict[str, Any]]:
    from effattn import _C  # what is staged may be asked for before there is a build

    return _C.isas()


def marked(*markers: str) -> list[str]:
    """The files with tests of one of these markers: no other needs to be imported.

    Without tests/device, which its users name, and without the files of the toy operator.
    """
    pattern = re.compile(rf"\bmark\.({'|'.join(markers)})\b")
    files = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
    others = ("device", "toy_operator")
    return [str(path) for path in files if path.parts[1] not in others and pattern.search((ROOT / path).read_text())]


def stage(folder: Path, *options: str) -> None:
    """Builds with sanitizers; ``options`` are those of csrc/build.py."""
    command = [sys.executable, "csrc/build.py", "--stage", str(folder), "--sanitize", SANITIZERS, *options]
    subprocess.run(command, check=True, cwd=ROOT)


def run(folder: Path, tests: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs pytest on what was staged, and returns its status."""
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),  # the latter for benchmarks alone
        "PYTHONSAFEPATH": "1",  # not the current folder first: it holds the ordinary build
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",  # one of pytest's processes a core; tests of threads ask for theirs
        **(environment or {}),
    }
    command = [
        sys.executable,
        "-c",
        RUN_TESTS,
        "-q",
        "-n",
        "auto",
        "--dist",
        "worksteal",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run([*command, *tests], cwd=ROOT, env=environment).returncode


def _runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
