"""The emulator finds what it is for: each fault of a kernel, and none where there is none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    program = tmp_path_factory.mktemp("emulator") / "faulty"
    sources = [KERNELS / "cuda" / "core" / "emulated" / "emulator.cpp", HERE / "faulty_kernels.cu"]
    flags = ["-std=gnu++20", "-O1", "-g1", "-fsanitize=address", "-DEFFATTN_EMULATED", "-x", "c++"]
    command = [os.environ.get("CXX", "g++"), *flags, *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(program, *arguments, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_no_fault(program, order):
    done = run(program, EFFATTN_EMULATOR_ORDER=order)
    assert done.returncode == 0 and done.stdout == "0 wrong\n", done.stderr


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("fault", ["missing_barrier", "not_copied", "read_early"])
def test_what_is_not_waited_for_gives_another_result(program, fault, order):
    """What nobody has written yet is NaN, whichever thread goes first; so is what is being copied, and what the
    launch in front of a dependent one has not written."""
    done = run(program, fault, EFFATTN_EMULATOR_ORDER=order)
    assert done.returncode == 3, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("beyond_shared", "heap-buffer-overflow"),
        ("beyond_global", "heap-buffer-overflow"),
        ("divergent", "threads of a group wait at different barriers|threads wait for some that do not come"),
        ("waits_alone", "threads wait for some that do not come"),
        ("not_tf32", "an operand of a product is not in TF32"),
        ("not_aligned", "an address in shared memory is not aligned"),
        ("not_waited_for", "a thread of a dependent launch did not wait"),
        ("first_dependent", "the first launch of a call is dependent"),
        ("not_ended", "a thread ended before what it copies was there"),
    ],
)
def test_a_fault_ends_the_program(program, fault, message):
    import re

    done = run(program, fault)
    assert done.returncode not in (0, 3) and re.search(message, done.stderr), done.stdout + done.stderr
