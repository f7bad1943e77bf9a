"""Verdicts about kernels: what is read, when it counts, who serves instead, and who is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import effattn
from effattn import _library, registry, verdicts
from effattn.__main__ import info
from effattn.backends import ORDER, triton
from effattn.verdicts import Verdict

CUDA = torch.device("cuda")
GPU, DRIVER = "NVIDIA H200", "580.65.06"
#: Two operators that Triton has kernels for.
OP, OTHER = sorted(triton.LAUNCHERS)[:2]
#: A backend that serves everything on a GPU, in front of the reference, and what its kernels are made of.
IDENTITY = "0123456789abcdef"


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, on which the Triton backend serves; what was chosen before is forgotten."""
    by_name = {backend.name: backend for backend in ORDER}
    triton = by_name["triton"]._replace(unavailable=lambda: None, reasons=lambda *call: [], identity=lambda: IDENTITY)
    order = (triton, by_name["reference"])
    monkeypatch.setattr(registry, "ORDER", order)
    monkeypatch.setattr(registry, "order", lambda *, is_small: order)
    monkeypatch.setattr(verdicts, "ORDER", order)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(verdicts, "driver_version", lambda: DRIVER)
    for table in ("_chosen", "_fused"):
        monkeypatch.setattr(registry, table, {})
    forget()
    yield
    forget()


def forget():
    for cached in (verdicts._known, verdicts.identity, verdicts.gpu_and_driver):
        cached.cache_clear()


def verdict(**changes):
    fields = {
        "gpu": GPU,
        "driver": DRIVER,
        "backend": "triton",
        "operator": OP,
        "dtype": "bfloat16",
        "direction": "backward",
        "identity": IDENTITY,
        "commit": "abc1234",
        "status": "crashed",
        "reason": "SIGSEGV",
    }
    return Verdict(**{**fields, **changes})


@pytest.fixture
def told(gpu, tmp_path, monkeypatch):
    """Writes verdicts and has them read."""

    def write(*found):
        file = tmp_path / "verdicts.json"
        verdicts.write(file, found)
        monkeypatch.setenv("EFFATTN_VERDICTS", str(file))
        forget()
        return file

    return write


def served(op=OP, dtype=torch.bfloat16):
    return registry.find(op, CUDA, dtype).name


def test_the_next_backend_serves_what_failed(told):
    told(verdict())
    assert served() == "reference"
    assert registry.choose(OP, CUDA, torch.bfloat16).name == "reference"
    assert served(dtype=torch.float16) == "triton" and served(OTHER) == "triton"


@pytest.mark.parametrize(
    "change", [{"gpu": "another"}, {"driver": "1"}, {"identity": "other kernels"}, {"backend": "cuda"}]
)
def test_a_verdict_about_something_else_does_not_count(told, change):
    told(verdict(**change))
    assert served() == "triton" and not registry.failed()


def test_two_drivers_that_nobody_knows_are_not_the_same(told, monkeypatch):
    monkeypatch.setattr(verdicts, "driver_version", lambda: verdicts.UNKNOWN)
    told(verdict(driver=verdicts.UNKNOWN))
    assert served() == "triton" and not registry.failed()


def test_a_forced_backend_says_what_failed(told):
    file = told(verdict())
    with effattn.use_backend("triton"), pytest.raises(RuntimeError) as error:
        registry.find(OP, CUDA, torch.bfloat16)
    expected = f"triton: failed when {OP} was tried on this GPU, backward in bfloat16: crashed (SIGSEGV)"
    assert expected in str(error.value) and str(file) in str(error.value)


def test_info_names_what_failed(told):
    assert "failed when" not in info() and "kernels that failed" not in info()
    told(verdict(), verdict(operator=OTHER, gpu="another"))
    lines = info().splitlines()
    (at,) = [
        i for i, line in enumerate(lines) if line.startswith("kernels that failed when they were tried on this GPU")
    ]
    assert lines[at + 1] == f"  triton     {OP}, backward in bfloat16: crashed (SIGSEGV)"
    assert "another" not in info() and OTHER not in info()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "got no JSON"),
        ("[]", "got list"),
        ('{"schema": 2, "verdicts": []}', "got schema 2"),
        ('{"schema": 1, "verdicts": [{"gpu": "c"}]}', "each with texts for gpu, driver"),
        ('{"schema": 1, "verdicts": [7]}', "got 7"),
    ],
)
def test_a_file_that_is_none_is_named_and_ignored(told, text, message):
    file = told(verdict())
    file.write_text(text)
    forget()
    with pytest.warns(UserWarning, match="verdicts about kernels are ignored") as caught:
        assert served() == "triton"
    (warning,) = caught
    assert str(file) in str(warning.message) and message in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served(dtype=torch.float32) == "triton", "it is said once"


def test_a_file_that_is_asked_for_and_missing_is_said(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFATTN_VERDICTS", str(tmp_path / "none.json"))
    with pytest.warns(UserWarning, match=r"none\.json"):
        assert served() == "triton"


@pytest.mark.parametrize(("method", "error"), [("exists", PermissionError), ("home", RuntimeError)])
def test_a_home_that_is_none_concerns_no_call(monkeypatch, method, error):
    """As in a container whose HOME another user owns."""

    def refuse(*_):
        raise error("not yours")

    monkeypatch.delenv("EFFATTN_VERDICTS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    forget()
    monkeypatch.setattr(verdicts.Path, method, refuse)
    try:
        for backend in ORDER:
            assert verdicts.reason(backend.name, OTHER, torch.device("cpu"), torch.float32) is None
        assert verdicts.here() == []
    finally:
        forget()


def test_where_they_lie(gpu, tmp_path, monkeypatch):
    monkeypatch.delenv("EFFATTN_VERDICTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert served() == "triton", "no file, no verdict"
    verdicts.write(tmp_path / "effattn" / "verdicts.json", [verdict()])
    assert served() == "triton", "it is read once a process"
    forget()
    assert served() == "reference"
    monkeypatch.setenv("EFFATTN_VERDICTS", "")
    forget()
    assert served() == "triton", "empty is none"
    monkeypatch.delenv("EFFATTN_VERDICTS")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert verdicts.path() == tmp_path / "home" / ".cache" / "effattn" / "verdicts.json"


def test_what_was_chosen_is_not_asked_again(told, monkeypatch):
    """A call costs no more than a look into a table, with verdicts or without."""
    told(verdict())
    registry.choose(OP, CUDA, torch.bfloat16)
    monkeypatch.setattr(verdicts, "reason", None)
    assert registry.choose(OP, CUDA, torch.bfloat16).name == "reference"


def test_identities_change_with_the_kernels(tmp_path, monkeypatch):
    from effattn.backends import triton

    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "configs.py").write_text("")
    monkeypatch.setattr(triton.configs, "__file__", str(folder / "configs.py"))
    first = triton._identity()
    assert triton._identity() == first and len(first) == 16
    (folder / "new.py").write_text("x = 1\n")
    assert triton._identity() != first


def test_a_run_forgets_what_it_has_tried_again(gpu, monkeypatch):
    from benchmarks.gpu.keep import merged
    from benchmarks.gpu.names import Kernel

    old = [
        verdict(),
        verdict(operator=OTHER),
        verdict(identity="older kernels"),
        verdict(gpu="another"),
        verdict(dtype="float16"),
    ]
    new = [verdict(dtype="float16", status="wrong")]
    tried = [Kernel(f"{OP} with talking heads", "triton", "bfloat16", "backward")]
    tried.append(Kernel(OP, "triton", "float16", "backward"))
    assert merged(old, new, tried, GPU, DRIVER) == [*old[1:4], *new]


def test_what_may_be_others_fault_is_kept_after_a_second_try():
    from benchmarks.gpu.keep import is_sure
    from benchmarks.gpu.names import Kernel

    kernel = Kernel(f"{OP} with talking heads", "triton", "bfloat16", "backward")
    assert all(is_sure(verdict(status=status), []) for status in ("wrong", "crashed"))
    for status in ("timeout", "error"):
        assert not is_sure(verdict(status=status), []) and is_sure(verdict(status=status), [kernel])


@pytest.mark.skipif(_library.cuda_error is not None, reason="the CUDA library is not built")
def test_the_library_knows_what_it_is_made_of():
    assert len(_library.cuda_digest) == 16 and verdicts.identity("cuda") == _library.cuda_digest


@pytest.mark.parametrize(
    ("device", "sources", "unrelated"),
    [
        (
            "cuda",
            ["kernels/cuda/core/reduction.cu", "csrc/cuda/backend.h"],
            ["kernels/cpu/core/simd.h", "csrc/cpu/lite_mla.cpp"],
        ),
        (
            "cpu",
            ["kernels/cpu/core/simd.h", "csrc/cpu/lite_mla.cpp"],
            ["kernels/cuda/core/reduction.cu", "csrc/cuda/backend.h"],
        ),
    ],
)
def test_the_digest_of_the_sources(tmp_path, monkeypatch, device, sources, unrelated):
    """Changes with any source, how they are compiled and the compiler, and with nothing else."""
    import importlib.util
    import shutil
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("effattn_build_of_digests", root / "csrc" / "build.py")
    build = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, build)
    spec.loader.exec_module(build)
    for folder in ("csrc", "kernels", "effattn/ops"):
        shutil.copytree(root / folder, tmp_path / folder)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    digest = getattr(build, f"{device}_digest")
    first = digest("nvcc 13.0")
    assert digest("nvcc 12.8") != first
    for path in (*unrelated, "kernels/triton/reduction.py"):
        (tmp_path / path).write_text("changed")
    assert digest("nvcc 13.0") == first
    for source in (*sources, "kernels/params/image.h", "csrc/multi_scale.cpp", "csrc/build.py"):
        with (tmp_path / source).open("a") as file:
            file.write("// changed\n")
        changed, first = first, digest("nvcc 13.0")
        assert changed != first, source


HERE = """
import sys, torch, effattn
from specified import expected, with_gradients
from effattn.backends import cpu
from effattn import registry, verdicts
from effattn.ops import OPERATORS
from effattn.tolerance import check

operator = OPERATORS[sys.argv[1]]
arguments, truth, allowed = expected(operator, operator.cases[0], torch.bfloat16)
cpu.DTYPES = ()
image, sizes = arguments[0], operator.limited_sizes(*arguments)
print(registry.find(operator.name, image.device, image.dtype, sizes).name)
call = torch.compile(operator, fullgraph=True, backend="aot_eager")
check(with_gradients(operator, call, arguments, torch.bfloat16), truth, allowed)
graphs = torch._dynamo.explain(operator)(*arguments)
print(graphs.graph_break_count, "effattn_triton" in str(graphs.graphs[0].code))
print(*verdicts.gpu_and_driver(image.device), verdicts.identity("triton"))
"""


def test_compiled_code_asks_too(tmp_path):
    """In its interpreter the Triton backend takes tensors of the host, where the CPU's own serves no more."""
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "EFFATTN_VERDICTS": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def run(**more):
        command = [sys.executable, "-c", HERE, OTHER]
        done = subprocess.run(command, capture_output=True, text=True, env={**environment, **more})
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    name, breaks, is_fused, gpu, driver, identity = run()
    assert (name, breaks, is_fused) == ("triton", "0", "True")
    file = tmp_path / "verdicts.json"
    failed = verdict(operator=OTHER, gpu=gpu, driver=driver, identity=identity)
    verdicts.write(file, [failed])
    assert json.loads(file.read_text())["verdicts"][0]["status"] == "crashed"
    name, breaks, is_fused, *_ = run(EFFATTN_VERDICTS=str(file))
    assert name != "triton" and (breaks, is_fused) == ("0", "False")
