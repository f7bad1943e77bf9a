"""Runs tests on aarch64 without an Arm machine: cross-compiled, and under qemu's user-mode emulation.

    python tests/aarch64.py [--cache build/aarch64] [--full] [pytest arguments...]

Without pytest arguments it runs tests marked numerics: those that are marked remainders too, or with ``--full`` all but
those of threads. The interpreter that runs this script is
the one that effattn is built with (ninja, pybind11, pip); everything else is made in the cache folder:

- ``sysroot``: Python and the C and C++ runtimes of the Debian release in use, for arm64;
- ``site``: torch, numpy and pytest for aarch64, from wheels;
- ``stage``: effattn, cross-compiled by csrc/build.py.

The first two are made once, with some 200 MB of downloads; delete the folder to have them made again. Debian's
qemu-user-static and g++-aarch64-linux-gnu must be installed; as root, the script installs them itself. Under
qemu importing torch alone takes half a minute, and tests that start another Python cannot run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from staged import marked

ROOT = Path(__file__).resolve().parent.parent
#: What threads do and what torch is told is not the business of an instruction set, and takes minutes here.
FULL = "numerics and not slow and not schedule and not registration"
#: Under emulation each test takes thirty times as long.
SHORT = f"{FULL} and remainders"

TRIPLET = "aarch64-linux-gnu"
COMPILER = f"{TRIPLET}-g++"
TOOLS = {"qemu-aarch64-static": "qemu-user-static", COMPILER: f"g++-{TRIPLET}"}  # program: Debian package

# The last torch whose aarch64 wheel is made for the CPU alone; it is also the oldest that effattn supports.
TORCH = "2.10.0"
# numpy is pinned to what that torch was made for. The second line is what torch itself needs: its wheel is
# installed without dependencies, since pip would judge them for this machine's processor and fetch CUDA.
PACKAGES = ["numpy==2.3.5", "psutil", "pytest", "hypothesis"]
PACKAGES += ["filelock", "fsspec", "jinja2", "networkx", "sympy", "typing_extensions"]

# Imports the emulated package before pytest can put any other folder on the path, so that the x86 build in
# the repository can never be what is tested, and runs the tests in the same process: torch loads slowly.
RUN_TESTS = """
import sys, effattn._C
build = effattn._C.build
if build["architecture"] != "aarch64":
    sys.exit(f"aarch64: imported {effattn._C.__file__}, a build for {build['architecture']}")
print(f"effattn for aarch64, instruction set {effattn._C.active_isa()}, {build['compiler']}", flush=True)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Says what takes the time, and how much it took."""
    print(f"aarch64: {title} ...", flush=True)
    start = time.monotonic()
    yield
    print(f"aarch64: {title}: {time.monotonic() - start:.0f} s", flush=True)


def install_tools() -> None:
    """Makes sure of the emulator and the cross-compiler."""
    missing = [package for program, package in TOOLS.items() if shutil.which(program) is None]
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        sys.exit("aarch64: cannot run these tests here: Python for arm64 is fetched with Debian's apt-get and dpkg-deb")
    if not missing:
        return
    names = " ".join(missing)
    if os.geteuid() != 0:
        sys.exit(f"aarch64: cannot run these tests without: apt-get install {names}")
    with phase(f"installing {names}"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "-qq", "update"], check=True, env=environment)
        command = ["apt-get", "-qq", "install", "--yes", "--no-install-recommends", *missing]
        subprocess.run(command, check=True, env=environment)


def prepare(folder: Path, recipe: str, make: Callable[[Path], None]) -> None:
    """Has ``make`` fill ``folder``, unless that was done before, to the end, by the same recipe."""
    stamp = folder / "recipe.txt"
    if stamp.exists() and stamp.read_text() == recipe:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with phase(f"making {folder.name}"):
        make(folder)
    stamp.write_text(recipe)


def make_sysroot(folder: Path) -> None:
    """Unpacks Python, its headers, and the libraries that it and torch load, for arm64."""
    with tempfile.TemporaryDirectory() as temporary:
        # apt with lists and cache of its own: the same sources, but for arm64. Neither root nor a second
        # architecture in the machine's dpkg is needed, and no trace is left.
        own = Path(temporary)
        (own / "lists/partial").mkdir(parents=True)
        (own / "archives/partial").mkdir(parents=True)
        (own / "debs").mkdir()
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "root",  # no change of user, which could not write here
            "Dir::Cache": own,
            "Dir::State::lists": own / "lists",
            "Dir::State::status": "/dev/null",  # nothing is installed for arm64
        }
        options = [f"-o{name}={value}" for name, value in settings.items()]

        def apt(*arguments: str) -> list[str]:
            command = [arguments[0], *options, *arguments[1:]]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=own / "debs")
            return done.stdout.splitlines()

        apt("apt-get", "-qq", "update")
        minors = [
            int(name.removeprefix("libpython3.").removesuffix("-stdlib"))
            for name in apt("apt-cache", "pkgnames", "libpython3.")
            if name.endswith("-stdlib")
        ]
        if not minors:
            sys.exit("aarch64: apt's sources have no Python for arm64 (Debian's do; tried with bookworm)")
        python = f"python3.{max(minors)}"
        parts = [f"{python}-minimal", f"lib{python}-minimal", f"lib{python}-stdlib"]
        # What these depend on, one level deep; the names of libraries change with the release.
        libraries = {
            line.removeprefix("  Depends: ")
            for line in apt("apt-cache", "--important", "depends", *parts)
            if line.startswith("  Depends: lib") or line == "  Depends: zlib1g"
        }
        libraries |= {"libc6", "libgcc-s1", "libgomp1", "libstdc++6"}  # the last three for torch
        apt("apt-get", "-qq", "download", *sorted({*parts, *libraries, f"lib{python}-dev"}))
        for deb in sorted((own / "debs").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)

    if not (folder / "lib").exists():  # newer releases leave this link to the package base-files
        (folder / "lib").symlink_to("usr/lib")
    # Debian's pyconfig.h includes <TRIPLET/python3.X/pyconfig.h>; let it be found beside Python.h.
    (folder / "usr/include" / python / TRIPLET).symlink_to(f"../{TRIPLET}")


def emulated_python(sysroot: Path) -> Path:
    return next(path for path in sysroot.glob("usr/bin/python3.*") if path.name.removeprefix("python3.").isdigit())


def make_site(folder: Path, version: str) -> None:
    """Installs wheels for aarch64 and Python ``version``."""
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--target", str(folder)]
    pip += ["--compile"]  # here: it takes the emulated Python thirty times as long
    pip += ["--only-binary=:all:", "--implementation", "cp", "--python-version", version]
    for platform in ("manylinux_2_28_aarch64", "manylinux2014_aarch64"):
        pip += ["--platform", platform]
    subprocess.run([*pip, "--no-deps", f"torch=={TORCH}"], check=True)
    subprocess.run([*pip, *PACKAGES], check=True)


def environment(cache: Path) -> tuple[Path, Path]:
    """The sysroot and the site in a cache folder, made where they are missing."""
    sysroot, site = cache / "sysroot", cache / "site"
    install_tools()
    prepare(sysroot, "1", make_sysroot)
    version = emulated_python(sysroot).name.removeprefix("python")
    prepare(site, f"{version} torch=={TORCH} {' '.join(PACKAGES)}", lambda folder: make_site(folder, version))
    return sysroot, site


def stage_package(stage: Path, sysroot: Path, site: Path) -> None:
    """Cross-compiles effattn into ``stage``; what is up to date is left alone."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import build

    python = emulated_python(sysroot).name
    target = build.Target(
        architecture="aarch64",
        compiler=COMPILER,
        torch_include=site / "torch/include",
        torch_lib=site / "torch/lib",
        torch_version=TORCH,
        python_include=sysroot / "usr/include" / python,
        extension_suffix=f".cpython-{python.removeprefix('python').replace('.', '')}-{TRIPLET}.so",
    )
    build.stage(target, stage)


def run_tests(stage: Path, sysroot: Path, site: Path, arguments: Sequence[str]) -> int:
    environment = {
        "OMP_NUM_THREADS": "2",
        # A plain server core. The default has every extension there is: torch's SVE code and signed pointers
        # are several times slower to emulate. Older cores than this do not run torch's wheel.
        "QEMU_CPU": "neoverse-n1",
        **os.environ,
        "QEMU_LD_PREFIX": str(sysroot),
        "PYTHONPATH": os.pathsep.join([str(stage), str(site)]),
        "PYTHONSAFEPATH": "1",  # not the current folder: it holds the x86 package
        "PYTHONNOUSERSITE": "1",  # nor the user's own packages
    }
    command = ["qemu-aarch64-static", str(emulated_python(sysroot)), "-c", RUN_TESTS, "-p", "no:cacheprovider"]
    code = subprocess.run([*command, *arguments], cwd=ROOT, env=environment).returncode
    if code < 0:
        print(f"aarch64: the emulator ended by {signal.Signals(-code).name}")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "build/aarch64", help="folder for all that is made")
    parser.add_argument("--full", action="store_true", help="the full tier")
    parser.add_argument("--prepare", action="store_true", help="what is downloaded, and no test")
    arguments, pytest_arguments = parser.parse_known_args()
    cache = arguments.cache.resolve()
    stage = cache / "stage"

    try:
        sysroot, site = environment(cache)
        if arguments.prepare:
            return 0
        with phase("cross-compiling"):
            stage_package(stage, sysroot, site)
    except subprocess.CalledProcessError as error:  # the command has said why
        sys.exit(f"aarch64: cannot run the tests: {error}")
    tier = ["--full"] if arguments.full else []
    # More draws of numbers ask for the tolerance, which is no instruction set's, and would take an hour.
    default = [*marked("numerics"), "-m", FULL if arguments.full else SHORT, "-k", "not test_other_numbers"]
    with phase("tests under qemu"):
        return run_tests(stage, sysroot, site, ["-q", "-x", *tier, *(pytest_arguments or default)])


if __name__ == "__main__":
    sys.exit(main())
