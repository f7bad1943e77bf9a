"""An operator is added as CONTRIBUTING.md has it, in a copy of the tree: a file a layer, and one function. What else it
would take is a fault of the tree. ``toy_operator`` has the files, where they belong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOY, NAME = ROOT / "tests" / "toy_operator", "squared_relu"
#: The only file that is there already.
EDITED = Path("effattn/functional.py")
BACKENDS = {"cpu": {}, "triton": {"TRITON_INTERPRET": "1"}}

# Imports what was staged before pytest can put any other folder on the path. The tests are made of the operators: of
# this one alone.
RUN_TESTS = """
import sys, effattn.ops, pytest
folder, name, *arguments = sys.argv[1:]
assert effattn.__file__.startswith(folder), effattn.__file__
for other in effattn.ops.OPERATORS.keys() - {name}:
    del effattn.ops.OPERATORS[other]
sys.exit(pytest.main(arguments))
"""


def copy_tree(to: Path) -> None:
    """What git has or would add, without what was built; all of it where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        built = shutil.ignore_patterns("*.so", "__pycache__", "build", "dist", ".*")
        shutil.copytree(ROOT, to, ignore=built)
        return
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def add_operator(tree: Path) -> None:
    for source in TOY.rglob("*.*"):
        path = source.relative_to(TOY)
        if path == EDITED:
            function = re.search(rf"^def {NAME}\(.*", source.read_text(), re.DOTALL | re.MULTILINE)
            replace(tree / path, "\n__all__ = [\n", f'\n{function[0]}\n\n__all__ = [\n    "{NAME}",\n')
        elif source.suffix != ".pyc":
            assert not (tree / path).exists(), f"{path}: is there already"
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, tree / path)


def build(tree: Path) -> Path:
    """For all instruction sets, so that ccache has what the operator does not touch from the build under test."""
    staged = tree / "build" / "staged"
    environment = {**os.environ, "EFFATTN_CUDA": "0"}
    command = [sys.executable, "csrc/build.py", "--stage", str(staged)]
    subprocess.run(command, check=True, cwd=tree, env=environment)
    return staged


def results(report: Path) -> dict[str, list[str]]:
    """The names of tests: those that "passed", "failure" and so on."""
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found.setdefault(case[0].tag if len(case) else "passed", []).append(case.attrib["name"])
    return found


def conformance(tree: Path, staged: Path, chosen: str, **environment: str) -> dict[str, list[str]]:
    """The results of the operator's tests."""
    report = tree / "report.xml"
    environment = {
        **os.environ,
        "PYTHONPATH": str(staged),
        "PYTHONSAFEPATH": "1",  # not the current folder first: it holds no libraries
        "OMP_NUM_THREADS": "1",  # other tests may run beside this one
        **environment,
    }
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, f"--junit-xml={report}"]
    command = [sys.executable, "-c", RUN_TESTS, str(staged), NAME, *options, "tests/conformance"]
    subprocess.run(command, cwd=tree, env=environment)
    return results(report)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy with the operator."""
    copy_tree(tmp_path / "tree")
    add_operator(tmp_path / "tree")
    return tmp_path / "tree"


def test_a_file_a_layer_is_all_that_it_takes(tree):
    pytest.importorskip("triton")
    staged = build(tree)
    for environment in BACKENDS.values():
        found = conformance(tree, staged, NAME, **environment)
        assert found.keys() - {"skipped"} == {"passed"}, found
        assert any("float64" in name for name in found["passed"]), found


@pytest.mark.full
def test_wrong_kernels_are_found_out(tree):
    pytest.importorskip("triton")
    replace(tree / f"kernels/cpu/{NAME}/ukernels.cpp", "relu_gate(positive, factor", "relu_gate(positive, -factor")
    replace(tree / f"kernels/triton/{NAME}.py", "0.0, factor[None, :] * positive", "0.0, -factor[None, :] * positive")
    staged = build(tree)
    for environment in BACKENDS.values():
        found = conformance(tree, staged, f"{NAME} and against_float64", **environment)
        assert found.keys() - {"skipped"} == {"failure"}, found


@pytest.mark.full
def test_its_kernels_for_cuda_are_found_too(tree):
    """Emulated."""
    report = tree / "report.xml"
    command = [sys.executable, "tests/emulated.py", "tests/conformance", "-k", NAME, f"--junit-xml={report}"]
    subprocess.run(command, check=True, cwd=tree)
    found = results(report)
    assert found.keys() == {"passed"} and any("cuda" in name for name in found["passed"]), found
