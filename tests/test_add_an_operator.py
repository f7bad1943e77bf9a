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
#: By backend: the environment of tests, and which run beside conformance: those of the operator, and those that every
#: operator has the files of the list.
RUNS = {
    "cpu": (
        {},
        f"{NAME} or every_operator or every_kernel or prefers",
        ["tests/test_layers.py", "tests/test_gpu_run.py", "tests/triton/compiled"],
    ),
    "triton": (
        {"TRITON_INTERPRET": "1", "EFFATTN_TESTED_BACKEND": "triton"},
        NAME,
        ["tests/device"],
    ),
}

# Imports what was staged before any other folder is on the path; benchmarks are not.
RUN_TESTS = """
import sys, effattn.ops, pytest
folder, *arguments = sys.argv[1:]
assert effattn.__file__.startswith(folder), effattn.__file__
sys.path.append(".")
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
    subprocess.run(["git", "init", "-q"], check=True, cwd=tree)  # tests count the files that name an operator
    subprocess.run(["git", "add", "."], check=True, cwd=tree)


def build(tree: Path) -> Path:
    """For all instruction sets, so that ccache has what the operator does not touch from the build under test."""
    staged = tree / "build" / "staged"
    environment = {**os.environ, "EFFATTN_CUDA": "0"}
    command = [sys.executable, "csrc/build.py", "--stage", str(staged)]
    subprocess.run(command, check=True, cwd=tree, env=environment)
    return staged


def results(report: Path) -> dict[str, list[str]]:
    """The names of tests: those that "passed", "failure" and so on; of those "skipped", the reasons."""
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kind = case[0].tag if len(case) else "passed"
        found.setdefault(kind, []).append(case[0].attrib["message"] if kind == "skipped" else case.attrib["name"])
    return found


def run_tests(tree: Path, staged: Path, chosen: str, *paths: str, **environment: str) -> dict[str, list[str]]:
    """The results of those that ``chosen`` selects, ``-k`` of pytest, in conformance and ``paths``."""
    report = tree / "report.xml"
    environment = {
        **os.environ,
        "PYTHONPATH": str(staged),
        "PYTHONSAFEPATH": "1",  # not the current folder first: it holds no libraries
        "OMP_NUM_THREADS": "1",  # other tests may run beside this one
        **environment,
    }
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, f"--junit-xml={report}"]
    command = [sys.executable, "-c", RUN_TESTS, str(staged), *options, "tests/conformance", *paths]
    subprocess.run(command, cwd=tree, env=environment)
    found = results(report)
    skipped = found.pop("skipped", [])
    assert all(re.match("this processor has no|is of cuda alone", reason) for reason in skipped), skipped
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy with the operator."""
    copy_tree(tmp_path / "tree")
    add_operator(tmp_path / "tree")
    return tmp_path / "tree"


def test_a_file_a_layer_is_all_that_it_takes(tree):
    pytest.importorskip("triton")
    staged = build(tree)
    for environment, chosen, paths in RUNS.values():
        found = run_tests(tree, staged, chosen, *paths, **environment)
        assert found.keys() == {"passed"}, found
        assert any("float64" in name for name in found["passed"]), found


@pytest.mark.full
def test_wrong_kernels_are_found_out(tree):
    pytest.importorskip("triton")
    replace(tree / f"kernels/cpu/{NAME}/ukernels.cpp", "relu_gate(positive, factor", "relu_gate(positive, -factor")
    replace(tree / f"kernels/triton/{NAME}.py", "0.0, factor[None, :] * positive", "0.0, -factor[None, :] * positive")
    staged = build(tree)
    for environment, _, _ in RUNS.values():
        found = run_tests(tree, staged, f"{NAME} and against_float64", **environment)
        assert found.keys() == {"failure"}, found


@pytest.mark.full
def test_its_kernels_for_cuda_are_found_too(tree):
    """Emulated."""
    report = tree / "report.xml"
    command = [sys.executable, "tests/emulated.py", "tests/conformance", "-k", NAME, f"--junit-xml={report}"]
    subprocess.run(command, check=True, cwd=tree)
    found = results(report)
    assert found.keys() == {"passed"} and any("cuda" in name for name in found["passed"]), found
