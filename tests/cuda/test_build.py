"""What the compiler made of the CUDA kernels, for GPUs that need not be here; and how it is asked."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from machine_code import cuobjdump
from tiers import full

from effattn import _library
from effattn.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = _library.library_path.with_name("libeffattn_cuda.so")

compiled = pytest.mark.skipif(
    not LIBRARY.exists() and shutil.which("nvcc") is None,
    reason="no nvcc here, so there are no CUDA kernels to look at",
)


@pytest.fixture
def archs(request):
    """What the library is compiled for at least (Makefile)."""
    return {"80", "90a"} if request.config.getoption("--full") else {"90a"}


@pytest.fixture(scope="module")
def resources():
    """By architecture and kernel, what a thread takes."""
    text = subprocess.run([cuobjdump(), "-res-usage", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    found = defaultdict(dict)
    arch = kernel = None
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif kernel is not None and "REG:" in line:
            found[arch][kernel] = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
    return found


@compiled
def test_nothing_is_spilled(resources, archs):
    """No kernel needs memory for what should be in registers: neither spills nor arrays on a stack."""
    assert archs <= set(resources), "compiled for too little"
    for arch, kernels in resources.items():
        assert len(kernels) > 100
        for kernel, used in kernels.items():
            assert used["STACK"] == 0 and used["LOCAL"] == 0, f"{kernel} for {arch}: {used}"
            assert used["REG"] <= 255


@compiled
def test_every_operator_has_kernels(resources):
    names = ("accumulate_kv_state", "attend_in_cluster", "query_gradients", "key_gradients", "aggregate_tile")
    names += ("accumulate_kv_state_tiles", "pointwise_backward", "depthwise_backward", "cga_forward", "cga_backward")
    names += ("softmax_gradients", "multiply_heads")
    for kernels in resources.values():
        for name in names:
            assert any(f"{len(name)}{name}" in kernel for kernel in kernels), name


@compiled
@pytest.mark.parametrize("arch", ["90a", full("80")])
def test_products_run_on_tensor_cores(arch):
    """In every kernel that multiplies matrices."""
    command = [cuobjdump(), "-sass", "-arch", f"sm_{arch}", str(LIBRARY)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"\n\s*Function : ", sass)[1:]
    without = [k.split("\n", 1)[0] for k in kernels if "HMMA" not in k]
    assert kernels
    allowed = ("add_up", "copy_image", "compact", "nothing", "tap_gradients", "depthwise_backward")
    assert all(any(name in kernel for name in allowed) for kernel in without), without


@compiled
def test_the_library_loads_without_a_gpu(archs):
    assert _library.cuda_error is None
    assert {arch.removesuffix("+PTX") for arch in _library.cuda_archs} >= archs
    for name in cuda.OPERATORS:
        for suffix in ("", "_forward", "_backward"):
            op = f"effattn::{name}{suffix}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"), op
    info = subprocess.run([sys.executable, "-m", "effattn", "info"], capture_output=True, text=True, check=True).stdout
    archs = re.escape(", ".join(_library.cuda_archs))
    assert re.search(rf"CUDA kernels compiled with nvcc \S+ for {archs} ", info)


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    reason = cuda.BACKEND.unavailable()
    assert reason == ("torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA")


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_driver_that_is_too_old_is_a_reason(monkeypatch):
    """One that is not there knows CUDA 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert re.fullmatch(r"is compiled with CUDA \d+, the driver knows CUDA 0", cuda.BACKEND.unavailable())


def test_which_gpus_run_what():
    assert cuda.runs_on((8, 0), ["80"]) and cuda.runs_on((8, 9), ["80"]) and not cuda.runs_on((7, 5), ["80"])
    assert not cuda.runs_on((9, 0), ["80"]) and cuda.runs_on((9, 0), ["80+PTX"])
    assert cuda.runs_on((9, 0), ["90a"]) and not cuda.runs_on((10, 0), ["90a"]) and not cuda.runs_on((8, 9), ["90a"])
    assert not cuda.runs_on((8, 7), ["80", "86"]) and cuda.runs_on((8, 7), ["87"]) and cuda.runs_on((8, 7), ["80+PTX"])
    assert cuda.runs_on((10, 3), ["100"]) and not cuda.runs_on((12, 0), ["100"]) and cuda.runs_on((12, 0), ["100+PTX"])
    assert not cuda.runs_on((8, 6), ["89"])


# --- how the compiler is asked ------------------------------------------------------------------------


@pytest.fixture
def found(monkeypatch):
    """csrc/build.py's search for a compiler of CUDA, in another environment; nvcc is one that only says what it is."""
    spec = importlib.util.spec_from_file_location("effattn_build", ROOT / "csrc" / "build.py")
    build = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "effattn_build", build)
    spec.loader.exec_module(build)
    says = {
        "--list-gpu-code": "sm_80\nsm_90\nsm_90a\nsm_100\n",
        "--version": "Cuda compilation tools, release 12.8, V12.8.1\n",
    }
    monkeypatch.setattr(build, "_output", lambda nvcc, option: says[option])

    def search(nvcc="/somewhere/nvcc", torch_has_cuda=True, **environment):
        for name in ("EFFATTN_CUDA", "EFFATTN_CUDA_ARCHS", "EFFATTN_CUDA_CHANNELS", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(build.shutil, "which", lambda name, path=None: nvcc)
        return build.Cuda.found(torch_has_cuda)

    return search


def test_cuda_is_found_or_asked_for(found):
    assert found(nvcc=None) is None and found(EFFATTN_CUDA="0") is None
    default = found()
    assert default.archs == ("80", "90a", "100+PTX") and default.version == "12.8", (
        "what this nvcc does not know is left out"
    )
    assert found(torch_has_cuda=False) is None, "ten minutes for kernels that this torch cannot call"
    assert found(torch_has_cuda=False, EFFATTN_CUDA="1").archs == default.archs
    with pytest.raises(SystemExit, match="EFFATTN_CUDA=1, but there is no nvcc"):
        found(nvcc=None, EFFATTN_CUDA="1")
    with pytest.raises(SystemExit, match="EFFATTN_CUDA: expected 0 or 1, got 'yes'"):
        found(EFFATTN_CUDA="yes")


def test_archs_are_those_asked_for(found):
    assert found(EFFATTN_CUDA_ARCHS="80 100+PTX").archs == ("80", "100+PTX")
    flags = found(EFFATTN_CUDA_ARCHS="90a 100+PTX").flags()
    assert flags == [
        "-DEFFATTN_CUDA_CHANNELS=128",
        "-gencode arch=compute_90a,code=sm_90a",
        "-gencode arch=compute_100,code=sm_100",
        "-gencode arch=compute_100,code=compute_100",
    ]
    for wrong in ("8.0", "70", "80,90", "sm_80", "90a+PTX"):
        with pytest.raises(SystemExit, match=f"EFFATTN_CUDA_ARCHS: expected .* got {re.escape(repr(wrong))}"):
            found(EFFATTN_CUDA_ARCHS=wrong)


def test_how_wide_heads_may_be(found):
    assert found(EFFATTN_CUDA_CHANNELS="32").flags()[0] == "-DEFFATTN_CUDA_CHANNELS=32"
    with pytest.raises(SystemExit, match="EFFATTN_CUDA_CHANNELS: expected 16, 32, 64 or 128, got '48'"):
        found(EFFATTN_CUDA_CHANNELS="48")


def test_an_older_compiler_has_code_for_newer_gpus_too(found, monkeypatch):
    build = sys.modules["effattn_build"]
    says = {"--list-gpu-code": "sm_80\nsm_86\nsm_89\nsm_90\n", "--version": "Cuda tools, release 12.4, V12.4.1\n"}
    monkeypatch.setattr(build, "_output", lambda nvcc, option: says[option])
    assert found().archs == ("80", "86", "89", "90a", "90+PTX")


def test_a_source_that_is_added_is_compiled(found, monkeypatch, tmp_path):
    build = sys.modules["effattn_build"]
    monkeypatch.setattr(build, "ROOT", tmp_path)
    both, device, host = "kernels/cuda/op/forward.cu", "csrc/cuda/device_only/a.cpp", "kernels/cuda/core/emulated/b.cpp"
    for path in (both, device, host, "kernels/cuda/op/api.h"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert build.cuda_sources(build.EMULATED) == [device, both]
    assert build.cuda_sources(build.DEVICE_ONLY) == [host, both]


def test_an_operator_is_compiled_where_it_has_kernels(found, monkeypatch, tmp_path):
    build = sys.modules["effattn_build"]
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/signature.cpp").touch()
    (tmp_path / "csrc/op.cpp").write_text("#include EFFATTN_KERNELS(op)\n")
    (tmp_path / "kernels/cpu/op").mkdir(parents=True)
    assert build.shared_glue("cpu") == ["csrc/op.cpp", "csrc/signature.cpp"]
    assert build.shared_glue("cuda") == ["csrc/signature.cpp"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_compiler_here_is_the_one_in_the_path(monkeypatch):
    build = importlib.util.spec_from_file_location("effattn_build_here", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(build)
    monkeypatch.setitem(sys.modules, "effattn_build_here", module)
    build.loader.exec_module(module)
    monkeypatch.delenv("EFFATTN_CUDA", raising=False)
    monkeypatch.setenv("EFFATTN_CUDA_ARCHS", "80")
    assert module.Cuda.found(torch_has_cuda=True).nvcc == shutil.which("nvcc") or "CUDA_HOME" in os.environ


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_torch_has_its_current_stream_where_the_library_looks():
    """csrc/cuda/backend.h: in what torch has loaded, for itself alone."""
    torch_cuda = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    assert torch_cuda.aoti_torch_get_current_cuda_stream
