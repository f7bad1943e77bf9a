"""The C interface of libeffattn_kernels: from C, and every operation with any strides, dtypes and threads."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from nodes import NODES, attributes_of
from specified import first_of, flattened

from effattn import _library
from effattn.testing import ORDERS, make_arguments

HERE = Path(__file__).resolve().parent
INCLUDE = _library.library_path.parent / "include"
LIBRARY = _library.library_path.with_name("libeffattn_kernels.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def test_from_c(tmp_path):
    """Compiled as strict C, linked with the library alone: no torch and no Python."""
    program = tmp_path / "interface"
    flags = ["-std=c11", "-D_POSIX_C_SOURCE=200809L", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-pthread"]
    linked = [LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}", "-lm"]
    source = HERE / "kernels_interface.c"
    subprocess.run(["cc", *flags, f"-I{INCLUDE}", source, *linked, "-o", program], check=True)
    done = subprocess.run([program, NODES[-1].name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stdout + done.stderr


def test_the_guides_program(tmp_path):
    """As it stands there, compiled as it says."""
    _, program, _, commands, _ = (HERE.parent / "docs/guide/hosts.md").read_text().split("```")
    (tmp_path / "program.c").write_text(program.removeprefix("c\n"))
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-e", "-c", commands], cwd=tmp_path, check=True, env={**os.environ, "PATH": scripts})
    subprocess.run([tmp_path / "a.out"], check=True)


def test_nothing_but_c_is_needed():
    """Neither torch nor Python, nor OpenMP: threads are the host's."""
    needed = re.findall(r"NEEDED\s+(\S+)", subprocess.check_output(["objdump", "-p", LIBRARY], text=True))
    runtime = r"lib(stdc\+\+|m|gcc_s|c|pthread)\.so|ld-linux"
    assert needed and all(re.match(runtime, name) for name in needed)


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", ctypes.c_int),
        ("rank", c_int32),
        ("shape", ctypes.POINTER(c_int64)),
        ("strides", ctypes.POINTER(c_int64)),
    ]

    def __init__(self, t):
        sizes, strides = (c_int64 * max(t.dim(), 1))(*t.shape), (c_int64 * max(t.dim(), 1))(*t.stride())
        super().__init__(t.data_ptr() if t.numel() else None, DTYPES[t.dtype], t.dim(), sizes, strides)


class Attribute(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("value", c_double)]


TASK = ctypes.CFUNCTYPE(None, c_void_p, c_int64)
RUN = ctypes.CFUNCTYPE(None, c_void_p, c_int64, TASK, c_void_p)


class Threads(ctypes.Structure):
    _fields_ = [("count", c_int32), ("pool", c_void_p), ("run", RUN)]


library = ctypes.CDLL(str(LIBRARY))
for function in (library.effattn_create, library.effattn_pack, library.effattn_shape, library.effattn_run):
    function.restype = c_char_p
library.effattn_destroy.argtypes = [c_void_p]


class Operation:
    """An operation, and what it is given."""

    def __init__(self, operator, arguments):
        given = attributes_of(operator, arguments)
        attributes = (Attribute * len(given))(*((name.encode(), value) for name, value in given.items()))
        self.pointer = c_void_p()
        made = library.effattn_create(operator.name.encode(), attributes, len(given), ctypes.byref(self.pointer))
        assert made is None, made

    def __del__(self):
        library.effattn_destroy(self.pointer)

    def pack(self, tensors):
        return library.effattn_pack(self.pointer, self.inputs(tensors), len(tensors))

    def __call__(self, tensors, out, threads=None):
        pool = None if threads is None else ctypes.byref(threads)
        return library.effattn_run(self.pointer, self.inputs(tensors), len(tensors), ctypes.byref(Tensor(out)), pool)

    @staticmethod
    def inputs(tensors):
        return (Tensor * len(tensors))(*map(Tensor, tensors))


CALLS = [pytest.param(op, case, id=f"{op.name}-{i}") for op in NODES for i, case in enumerate(op.cases)]


@pytest.mark.numerics
@pytest.mark.pairwise
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [order for order in ORDERS if order != "gaps"])
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_the_same_bits_as_in_pytorch(operator, case, order, dtype, is_packed):
    arguments = make_arguments(operator, case, dtype, order)
    right = first_of(operator(*arguments))
    operation, tensors, out = Operation(operator, arguments), flattened(arguments), torch.full_like(right, torch.nan)
    if is_packed:
        assert operation.pack(tensors) is None
    assert operation(tensors, out) is None
    assert torch.equal(out, right)
    # All tasks of the host's pool by one thread, the last first.
    backwards = Threads(7, None, RUN(lambda pool, count, task, context: [task(context, i) for i in range(count)[::-1]]))
    out.fill_(torch.nan)
    assert operation(tensors, out, backwards) is None
    assert torch.equal(out, right)


@pytest.mark.numerics
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_nothing_is_written_beside_the_output(operator, case):
    arguments = make_arguments(operator, case)
    right = first_of(operator(*arguments))
    room = torch.full((right.numel() + 64,), torch.nan)
    out = room[32:-32].view(right.shape)
    assert Operation(operator, arguments)(flattened(arguments), out) is None
    assert torch.equal(out, right) and room[:32].isnan().all() and room[-32:].isnan().all()


@pytest.mark.arguments
def test_images_must_have_mergeable_rows():
    operator = next(op for op in NODES if op.signature.is_of_images)
    arguments = make_arguments(operator, operator.cases[0], order="gaps")
    out = torch.empty_like(first_of(operator(*arguments)))
    assert b"rows follow each other" in Operation(operator, arguments)(flattened(arguments), out)


def test_an_error_of_a_task_comes_out():
    """Memory that cannot be had: the error goes through the host's pool, which knows no exceptions."""
    script = (
        "import resource, sys; sys.path[:0] = sys.argv[1:]; import torch;"
        "from test_kernels_interface import *; op = NODES[-1];"
        "sizes = {**op.cases[0], 'N': 64, 'M': 64, 'D': 30000, 'Dv': 30000, '...': (1,)};"
        "arguments = make_arguments(op, sizes); out = torch.empty(1, 64, 30000); operation = Operation(op, arguments);"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30,) * 2);"
        "pool = Threads(2, None, RUN(lambda p, count, task, c: [task(c, i) for i in range(count)]));"
        "print(operation(flattened(arguments), out, pool).decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(HERE), str(HERE / "tools")], capture_output=True, text=True
    )
    assert "cannot allocate" in done.stdout, done.stdout + done.stderr
