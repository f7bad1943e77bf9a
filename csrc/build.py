"""Compiles effattn's native code with ninja.

Shared objects come out, side by side in the package folder:

- ``libeffattn_kernels.so``: the CPU kernels and their C interface (``csrc/engines``); knows no torch.
- ``libeffattn_onnxruntime.so``: the same as onnxruntime's custom operators; needs no onnxruntime to be compiled.
- ``libeffattn.so``: schemas and glue of those kernels, against the LibTorch stable ABI; needs no Python.
- ``libeffattn_cuda.so``: glue and CUDA kernels, where there is an nvcc. ``EFFATTN_CUDA=0`` leaves it out, ``1`` asks
  for it; ``EFFATTN_CUDA_ARCHS`` says for which GPUs, "80 90a 100+PTX", ``EFFATTN_CUDA_CHANNELS`` for how wide heads.
- ``_C.<tag>.so``: build facts, instruction sets and plans, with pybind11.

``setup.py`` uses this for wheels and editable installs. Run as a script it stages an importable copy
of the package elsewhere, optionally sanitized or cross-compiled, for the tests that need one::

    python csrc/build.py --stage build/asan --sanitize address,undefined
    python csrc/build.py --stage build/aarch64 --architecture aarch64 --compiler aarch64-linux-gnu-g++ \\
        --torch-include SITE/torch/include --torch-lib SITE/torch/lib --python-include INCLUDE --tag SUFFIX
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import importlib.util
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# The only list of instruction sets: name, lanes of the SIMD vector, compiler flags. From narrow to
# wide. avx2_wide is the 16-lane source compiled for AVX2: it lets tests run the AVX-512 logic on
# processors without AVX-512, is compiled on those alone, and is never picked by itself.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
ISAS: dict[str, list[tuple[str, int, tuple[str, ...]]]] = {
    "x86_64": [
        ("baseline", 4, ()),
        ("avx2_wide", 16, (*_AVX2, "-O1", "-DEFFATTN_UNROLL=")),  # its speed is of no interest, its build time is
        ("avx2", 8, _AVX2),
        ("avx512", 16, (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")),
    ],
    "aarch64": [("neon", 4, ())],
}
_OTHER = [("baseline", 4, ())]

# What includes files that are made here.
INCLUDE_GENERATED = ("csrc/core/library.cpp", "csrc/signature.cpp")
# Compiled with macros for what effattn._C.build says.
FACTS = "csrc/python/python.cpp"
# Reads weights where they lie.
FINGERPRINT = "csrc/python/fingerprint.cpp"
# Compiled with what libeffattn, and libeffattn_kernels, say they were built of.
IDENTITY = ("csrc/core/digest.cpp", "csrc/engines/digest.cpp")

# Every source under these folders is part of the CUDA library; what is in a folder of the second name is for a GPU
# alone, of the third for the host alone, where the threads of a block are emulated.
CUDA, DEVICE_ONLY, EMULATED = ("kernels/cuda", "csrc/cuda"), "device_only", "emulated"
# Compiled with what libeffattn_cuda says it was built of.
CUDA_IDENTITY = "csrc/cuda/library.cpp"
# Compute capabilities; of the last one also code that newer GPUs can translate.
CUDA_ARCHS = ("80", "86", "89", "90a", "100+PTX")

LIBRARY = "libeffattn.so"
KERNELS_LIBRARY = "libeffattn_kernels.so"
ONNXRUNTIME_LIBRARY = "libeffattn_onnxruntime.so"
CUDA_LIBRARY = "libeffattn_cuda.so"
# Where the header of the C interface is: in the package, since hosts are compiled against it.
INTERFACE = "effattn/include"
# Compiled with the version.
VERSIONED = "csrc/engines/operation.cpp"

# Of wheels, in every library: what older C and C++ runtimes lack.
PORTABLE = "csrc/wheel/portable.cpp"

# One build serves every torch from here on.
TORCH_TARGET = ("2.10", "0x020a000000000000")


@dataclasses.dataclass
class Cuda:
    """A compiler of CUDA, and what for."""

    nvcc: str
    version: str
    archs: tuple[str, ...]
    channels: int = 128  # of a head of linear attention, at most: half of the build time is for wide ones

    @classmethod
    def found(cls, torch_has_cuda: bool) -> Cuda | None:
        """As EFFATTN_CUDA and EFFATTN_CUDA_ARCHS say; whether there is a GPU plays no part.

        Unasked, only for a torch with CUDA: five architectures take ten minutes, which another torch has no use for.
        """
        wanted = os.environ.get("EFFATTN_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"EFFATTN_CUDA: expected 0 or 1, got {wanted!r}")
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
        if wanted == "0" or (wanted == "" and (nvcc is None or not torch_has_cuda)):
            return None
        if nvcc is None:
            raise SystemExit("EFFATTN_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME")
        known = {code.removeprefix("sm_") for code in _output(nvcc, "--list-gpu-code").split()}
        asked = os.environ.get("EFFATTN_CUDA_ARCHS", "").split()
        archs = asked or [arch for arch in CUDA_ARCHS if _capability(arch) in known]
        if not any(arch.endswith("+PTX") for arch in archs) and not asked:
            archs.append(f"{_capability(archs[-1])}+PTX")  # an nvcc that does not know the newest GPUs
        for arch in archs:
            # What is for one GPU alone ("90a") cannot be translated for another.
            if _capability(arch) not in known or re.search(r"[af]\+PTX$", arch):
                raise SystemExit(
                    f"EFFATTN_CUDA_ARCHS: expected compute capabilities that {nvcc} knows, separated by spaces "
                    f"({', '.join(sorted(known, key=lambda arch: int(_capability(arch))))}; 90a, 100+PTX), got {arch!r}"
                )
        channels = os.environ.get("EFFATTN_CUDA_CHANNELS") or str(cls.channels)
        if channels not in ("16", "32", "64", "128"):
            raise SystemExit(f"EFFATTN_CUDA_CHANNELS: expected 16, 32, 64 or 128, got {channels!r}")
        version = _output(nvcc, "--version").split("release ")[1].split(",")[0]
        return cls(nvcc, version, tuple(archs), int(channels))

    def flags(self) -> list[str]:
        flags = [f"-DEFFATTN_CUDA_CHANNELS={self.channels}"]
        for arch in self.archs:
            name = arch.removesuffix("+PTX")
            flags.append(f"-gencode arch=compute_{name},code=sm_{name}")
            if name != arch:
                flags.append(f"-gencode arch=compute_{name},code=compute_{name}")
        return flags


def _sources(*patterns: str) -> list[str]:
    """Files below the root: what is added to a folder is compiled without an entry anywhere."""
    paths = (path for pattern in patterns for path in sorted(ROOT.glob(pattern)))
    return [path.relative_to(ROOT).as_posix() for path in paths if path.is_file()]


def shared_glue(device: str) -> list[str]:
    """That of the differentiable operators, the same for every library: of those that have kernels for the device."""

    def has_kernels(source: str) -> bool:
        op = re.search(r"EFFATTN_KERNELS\((\w+)\)", (ROOT / source).read_text())
        return op is None or (ROOT / "kernels" / device / op[1]).exists()

    return [source for source in _sources("csrc/*.cpp") if has_kernels(source)]


def cpu_digest(compiler: str) -> str:
    """Of the sources that libeffattn is made of, of how they are compiled, and of the compiler."""
    return _digest("cpu", compiler)


def cuda_digest(compiler: str) -> str:
    """The same of the CUDA library: what is said of one build holds for all builds with the same digest."""
    return _digest("cuda", compiler)


def _digest(device: str, compiler: str) -> str:
    found = hashlib.sha256("".join((compiler, *generated().values())).encode())
    glue = ("csrc/*.[ch]*", "csrc/core/*.cpp", f"csrc/{device}/**/*", "csrc/build.py")
    for source in _sources("kernels/params/*.h", f"kernels/{device}/**/*", *glue):
        found.update(source.encode() + b"\0" + (ROOT / source).read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _capability(arch: str) -> str:
    """Without what says that it is for this one only, or for later ones too."""
    return arch.removesuffix("+PTX").rstrip("af")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclasses.dataclass
class Target:
    """What to build for. The defaults describe this interpreter and this machine."""

    architecture: str
    compiler: str
    torch_include: Path
    torch_lib: Path
    torch_version: str
    python_include: Path
    extension_suffix: str
    sanitize: str = ""
    without: tuple[str, ...] = ()  # instruction sets to leave out
    cuda: Cuda | None = None
    emulate_cuda: bool = False  # compile the CUDA kernels for the host, in place of the CPU's
    # For machines with older C and C++ runtimes than this one.
    portable: bool = dataclasses.field(default_factory=lambda: os.environ.get("EFFATTN_PORTABLE") == "1")

    @classmethod
    def native(cls, sanitize: str = "", without: tuple[str, ...] = (), emulate_cuda: bool = False) -> Target:
        torch = import_torch()
        base = Path(str(torch.__file__)).parent
        return cls(
            architecture=platform.machine(),
            compiler=os.environ.get("CXX", "g++"),
            torch_include=base / "include",
            torch_lib=base / "lib",
            torch_version=torch.__version__,
            python_include=Path(sysconfig.get_path("include")),
            extension_suffix=sysconfig.get_config_var("EXT_SUFFIX"),
            sanitize=sanitize,
            without=without,
            cuda=None if sanitize or emulate_cuda else Cuda.found(torch.version.cuda is not None),
            emulate_cuda=emulate_cuda,
        )


def import_torch() -> ModuleType:
    """torch, or an error that says how to install both in the right order."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            "effattn is compiled against the torch that is installed, and none can be imported here "
            f"({error}). Install torch >= {TORCH_TARGET[0]} first, then effattn with --no-build-isolation."
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < tuple(int(part) for part in TORCH_TARGET[0].split(".")):
        raise SystemExit(f"effattn needs torch >= {TORCH_TARGET[0]}, found {torch.__version__}.")
    return torch


def _needs_wide(target: Target) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return not target.portable and cpuinfo.exists() and "avx512f" not in cpuinfo.read_text()


def compiler_launcher() -> str:
    """What stands in front of a compiler's command line: ``EFFATTN_COMPILER_LAUNCHER``, or the ccache that is there.

    No part of a build's identity: ``compiler_of`` and digests name the compiler alone.
    """
    return os.environ.get("EFFATTN_COMPILER_LAUNCHER", shutil.which("ccache") or "")


def _compiler_environment() -> dict[str, str]:
    """Paths count for ccache as seen from the tree, so that an sdist's objects are those of a checkout."""
    return {"CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1", **os.environ}


def compiler_of(target: Target) -> str:
    """Its name and version, as it says them."""
    return _output(target.compiler, "--version").splitlines()[0]


def ninja_file(target: Target, output: Path, objects: Path, extension_only: bool = False) -> str:
    import pybind11
    from ninja import ninja_syntax

    without = {*target.without, *(() if _needs_wide(target) else ("avx2_wide",))}
    isas = [row for row in ISAS.get(target.architecture, _OTHER) if row[0] not in without]
    pybind11_folder = pybind11.get_include()
    rows = "".join(f" ROW({name}, {lanes}, __VA_ARGS__)" for name, lanes, _ in isas)
    optimised = ["-O2", "-g0"]
    debugged = ["-Og", "-g1", "-fno-omit-frame-pointer", "-DEFFATTN_UNROLL="] if target.sanitize else optimised
    checks = [f"-fsanitize={target.sanitize}", "-fno-sanitize-recover=all"] if target.sanitize else []
    if "undefined" in target.sanitize:  # twice the build time for what crashes anyway, and what address finds too
        checks.append("-fno-sanitize=null,object-size,pointer-overflow")
    common = [
        "-std=gnu++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=fast",  # a * b + c is one rounding wherever the processor can
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Wno-maybe-uninitialized",  # both false in the headers of GCC 12 for AVX-512
        "-Wno-uninitialized",
        # Assertions in headers name files: of torch, Python and pybind11, not of this machine.
        *(
            f"-fmacro-prefix-map={folder}/="
            for folder in (target.torch_include, target.python_include, pybind11_folder)
        ),
        "-Wno-psabi",  # vectors wider than the baseline's registers never cross a function boundary
        f"'-DEFFATTN_ISA_LIST(ROW, ...)={rows}'",
    ]
    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET[1]}", f"-isystem {target.torch_include}"]
    facts = {
        "COMPILER": compiler_of(target),
        "TORCH_VERSION": target.torch_version,
        "ARCHITECTURE": target.architecture,
        "SANITIZER": target.sanitize,
    }
    python_flags = [f"-isystem {target.python_include}", f"-isystem {pybind11_folder}"]
    facts_flags = [f"'-DEFFATTN_{name}=\"{value}\"'" for name, value in facts.items()]

    text = StringIO()
    ninja = ninja_syntax.Writer(text, width=1000)
    ninja.variable("builddir", str(objects))
    ninja.rule(
        "compile",
        f"{compiler_launcher()} {target.compiler} {' '.join(common)} $flags -MMD -MF $out.d -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="compile $out",
    )
    portable = f"-std=gnu++20 -O2 -fPIC {ROOT / PORTABLE}" if target.portable else ""
    link = f"{target.compiler} -shared {' '.join(checks)} $in {portable} -o $out $flags"
    ninja.rule("link", link, description="link $out")

    def compile(source: str, flags: Iterable[str], name: str = "", mode: Iterable[str] = (*debugged, *checks)) -> str:
        path = str(objects / (source.replace("/", "_") + (f".{name}" if name else "") + ".o"))
        generated = [f"-I{objects}"] if source in INCLUDE_GENERATED else []
        return ninja.build(path, "compile", source, variables={"flags": " ".join([*mode, *flags, *generated])})[0]

    library = output / LIBRARY
    outputs: list[Path] = []
    if not extension_only:
        outputs = _add_libraries(ninja, target, isas, library, objects, compile, torch_flags)
    extension = output / f"_C{target.extension_suffix}"
    ninja.build(
        str(extension),
        "link",
        [
            # Those that read no memory of tensors are not sanitized, but the objects of the ordinary build.
            compile(
                source,
                [*python_flags, *(facts_flags if source == FACTS else [])],
                mode=(*debugged, *checks) if source == FINGERPRINT else optimised,
            )
            for source in _sources("csrc/python/*.cpp")
        ],
        implicit=[str(library), str(output / KERNELS_LIBRARY)],
        variables={"flags": f"{_beside(output, 'effattn', 'effattn_kernels')} -Wl,--allow-shlib-undefined"},
    )
    ninja.default([*map(str, outputs), str(extension)])
    return text.getvalue()


def _beside(output: Path, *libraries: str) -> str:
    """Flags to link libraries that lie in the same folder, wherever it is moved."""
    return f"-L{output} {' '.join(f'-l{name}' for name in libraries)} -Wl,-rpath,'$$ORIGIN'"


def version() -> str:
    """effattn's, without importing it."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "effattn" / "__init__.py").read_text(), re.M)
    assert found is not None
    return found[1]


def _add_libraries(
    ninja: Any,
    target: Target,
    isas: list[tuple[str, int, tuple[str, ...]]],
    library: Path,
    objects: Path,
    compile: Callable[..., str],
    torch_flags: list[str],
) -> list[Path]:
    """All of them but ``_C``: libeffattn_cuda where there is one."""
    # Where CUDA is emulated, its operators take the tensors of the CPU.
    glue = ["csrc/signature.cpp"] if target.emulate_cuda else [*shared_glue("cpu"), *_sources("csrc/cpu/*.cpp")]
    compiler = compiler_of(target)
    identity = f"'-DEFFATTN_BUILD=\"{compiler}; {cpu_digest(compiler)}\"'"
    ukernels = _sources("kernels/cpu/**/ukernels*.cpp")
    kernels = [*_sources("csrc/engines/*.cpp"), *sorted({*_sources("kernels/cpu/**/*.cpp")}.difference(ukernels))]
    # Checks of addresses as calls, not inline: half of the build time.
    calls = ["--param asan-instrumentation-with-call-threshold=0"] if "address" in target.sanitize else []
    parts = []
    for source, (name, lanes, flags) in itertools.product(ukernels, isas):  # first what takes longest
        parts.append(compile(source, [*flags, *calls, f"-DEFFATTN_ISA={name}", f"-DEFFATTN_LANES={lanes}"], name))
    interface = f"-I{ROOT / INTERFACE}"
    told = {VERSIONED: f"'-DEFFATTN_VERSION=\"{version()}\"'"} | dict.fromkeys(IDENTITY, identity)
    parts += [compile(source, [interface, told.get(source, "")]) for source in kernels]
    # By its name, not by the path that it was linked by, for who links against it elsewhere.
    named = {"flags": f"-Wl,-soname,{KERNELS_LIBRARY}"}
    ninja.build(str(library.with_name(KERNELS_LIBRARY)), "link", parts, variables=named)
    parts = [compile(source, [interface]) for source in _sources("csrc/engines/onnxruntime/*.cpp")]
    kernels_flags = _beside(library.parent, "effattn_kernels")
    beside = {"implicit": [str(library.with_name(KERNELS_LIBRARY))]}
    linked = {"flags": kernels_flags}
    ninja.build(str(library.with_name(ONNXRUNTIME_LIBRARY)), "link", parts, variables=linked, **beside)
    parts = []
    for source in sorted({*_sources("csrc/core/*.cpp"), *glue}):
        parts.append(compile(source, [*torch_flags, identity] if source in IDENTITY else torch_flags))
    # libtorch_cpu is in the process already when this is loaded; nothing of it is searched for.
    link_torch = f"-L{target.torch_lib} -ltorch_cpu -Wl,--as-needed -Wl,--allow-shlib-undefined"
    ninja.build(str(library), "link", parts, variables={"flags": f"{link_torch} {kernels_flags}"}, **beside)
    outputs = [library, library.with_name(KERNELS_LIBRARY), library.with_name(ONNXRUNTIME_LIBRARY)]
    if target.emulate_cuda:
        emulated = [*torch_flags, "-DEFFATTN_CUDA", "-DEFFATTN_EMULATED", "-x c++"]
        identity = f"'-DEFFATTN_CUDA_BUILD=\"emulated; ; {cuda_digest('emulated')}\"'"
        parts = [
            compile(source, [*emulated, identity] if source == CUDA_IDENTITY else emulated, "emulated")
            for source in (*cuda_sources(DEVICE_ONLY), *shared_glue("cuda"))
        ]
        outputs.append(library.with_name(CUDA_LIBRARY))
        ninja.build(str(outputs[-1]), "link", parts, variables={"flags": link_torch})
    if target.cuda is not None:
        outputs.append(library.with_name(CUDA_LIBRARY))
        _add_cuda(ninja, target, target.cuda, objects, outputs[-1], compile, torch_flags, link_torch)
    return outputs


def cuda_sources(without: str) -> list[str]:
    """Those of the CUDA library, without the ones in folders of a name."""
    found = _sources(*(f"{folder}/**/*.c[pu]*" for folder in CUDA))
    return sorted(source for source in found if without not in source.split("/"))


def _add_cuda(
    ninja: Any,
    target: Target,
    cuda: Cuda,
    objects: Path,
    library: Path,
    compile: Callable[..., str],
    torch_flags: list[str],
    link_torch: str,
) -> None:
    flags = [
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "--threads 4",  # code for several GPUs at once: the largest source would be waited for
        f"-ccbin {target.compiler}",
        "-Xcompiler -fPIC,-fvisibility=hidden,-Wall",
        *cuda.flags(),
    ]
    ninja.rule(
        "compile_cuda",
        f"{compiler_launcher()} {cuda.nvcc} {' '.join(flags)} -MD -MF $out.d -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="compile $out",
    )
    portable = f"-std=c++20 -O2 -Xcompiler -fPIC {ROOT / PORTABLE}" if target.portable else ""
    link = f"{cuda.nvcc} -ccbin {target.compiler} -shared $in {portable} -o $out $flags"
    ninja.rule("link_cuda", link, description="link $out")
    fewer_channels = "" if cuda.channels == Cuda.channels else f", {cuda.channels} channels"  # not everybody's build
    build = f"nvcc {cuda.version}; {' '.join(cuda.archs)}; {cuda_digest(f'nvcc {cuda.version}{fewer_channels}')}"
    glue_flags = [*torch_flags, "-DEFFATTN_CUDA"]
    parts = []
    for source in (*cuda_sources(EMULATED), *shared_glue("cuda")):
        if source.endswith(".cu"):
            path = str(objects / (source.replace("/", "_") + ".o"))
            parts += ninja.build(path, "compile_cuda", source)
        else:
            identity = [f"'-DEFFATTN_CUDA_BUILD=\"{build}\"'"] if source == CUDA_IDENTITY else []
            parts.append(compile(source, [*glue_flags, *identity], "cuda"))
    through_nvcc = " ".join(
        f"-Xlinker {flag.removeprefix('-Wl,')}" if flag.startswith("-Wl,") else flag for flag in link_torch.split()
    )
    ninja.build(str(library), "link_cuda", parts, variables={"flags": through_nvcc})


def generated() -> dict[str, str]:
    """By name, what sources include of the signatures and schemas that stand in effattn/ops, a file an operator."""
    reader = _signature_reader()
    tables, schemas = _Tables(), []
    for path in sorted((ROOT / "effattn" / "ops").glob("[!_]*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            if node.targets[0].id == "SIGNATURE":
                signature = reader.Signature(ast.literal_eval(node.value))
                tables.add(path.stem, signature)
                schemas += signature.schemas(path.stem)
            elif node.targets[0].id == "SCHEMA":
                schemas.append(f"{path.stem}{ast.literal_eval(node.value)}")
    return {"signatures.inc": tables.source(), "schemas.inc": ",\n".join(map(_quoted, schemas))}


def _signature_reader() -> Any:
    """effattn/ops/_signature.py, without the package, which is not built yet."""
    spec = importlib.util.spec_from_file_location("_signature", ROOT / "effattn" / "ops" / "_signature.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _quoted(text: str) -> str:
    return f'"{text}"'


class _Tables:
    """``kTables`` of csrc/signature.cpp: arrays of constants, which cost neither code nor time at start-up."""

    KINDS = {"tensor": "kTensor", "image": "kTensor", "weight": "kWeight", "integer": "kInteger"} | dict.fromkeys(
        ("number", "numbers"), "kNumber"
    )

    def __init__(self) -> None:
        self.arrays: dict[str, str] = {}  # names by definition
        self.tables: list[str] = []

    def source(self) -> str:
        lines = [definition.replace("[]", f" {name}[]", 1) for definition, name in self.arrays.items()]
        return "\n".join([*lines, f"constexpr Table kTables[] = {{{', '.join(self.tables)}}};"])

    def add(self, op: str, signature: Any) -> None:
        returned = (signature.out, *signature.kept)
        shapes = [shape for a in signature.arguments for shape in a.shapes] + [r.shape for r in returned]
        dims = [a.length for a in signature.arguments if a.length] + [dim for shape in shapes for dim in shape.dims]
        names = list(dict.fromkeys(name for dim in dims for name in dim.names))
        integers = [names.index(a.name) if a.kind == "integer" and a.name in names else -1 for a in signature.arguments]

        def dim(d: Any) -> str:
            terms = [f"{{{factor}, {self._array('int', [str(names.index(n)) for n in of])}}}" for factor, of in d.sum]
            needs = f", .{d.needs} = true" if d.needs else ""
            return f"{{.text = {_quoted(d.text)}, .sum = {self._array('Term', terms)}{needs}}}"

        def shape(s: Any) -> str:
            leading = ", .has_leading = true" if s.has_leading else ""
            return f"{{.text = {_quoted(s.text)}, .dims = {self._array('Dim', map(dim, s.dims))}{leading}}}"

        def argument(a: Any) -> str:
            parts = [f".name = {_quoted(a.name)}", f".kind = ArgumentKind::{self.KINDS[a.kind]}"]
            parts += [f".shapes = {self._array('Shape', map(shape, a.shapes))}"] if a.shapes else []
            parts += [".is_list = true"] if a.length else []
            parts += [".may_be_empty = true"] if a.may_be_empty else []
            parts += [f".length = {dim(a.length)}"] if a.length else []
            ends = {name: getattr(a, name) for name in ("minimum", "maximum")}
            parts += [f".{name} = {end}" for name, end in ends.items() if math.isfinite(end)]
            return f"{{{', '.join(parts)}}}"

        outs = [f"{{.name = {_quoted(r.name)}, .shapes = {self._array('Shape', [shape(r.shape)])}}}" for r in returned]
        parts = [
            _quoted(op),
            self._array("Text", map(_quoted, names)),
            self._array("bool", (str(name in signature.local).lower() for name in names)),
            self._array("int", map(str, integers)),
            self._array("ArgumentSpec", map(argument, signature.arguments)),
            self._array("ArgumentSpec", outs),
        ]
        self.tables.append(f"{{{', '.join(parts)}}}")

    def _array(self, kind: str, items: Iterable[str]) -> str:
        """The name of an array of constants; what is the same is one."""
        text = ", ".join(items)
        if not text:
            return "{}"
        return self.arrays.setdefault(f"constexpr {kind}[] = {{{text}}};", f"k{kind.title()}{len(self.arrays)}")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def build(
    target: Target, output: Path, objects: Path, verbose: bool = False, extension_only: bool = False
) -> list[Path]:
    """Compiles what is out of date and returns the shared objects in ``output``.

    With ``extension_only`` that is ``_C`` alone, beside libraries that are there already.
    """
    import ninja

    output.mkdir(parents=True, exist_ok=True)
    objects.mkdir(parents=True, exist_ok=True)
    for name, text in generated().items():
        _write_if_changed(objects / name, text)
    (objects / "build.ninja").write_text(ninja_file(target, output.resolve(), objects.resolve(), extension_only))
    # From the root: sources have the same names in every build, and with them the objects in ccache.
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(objects.resolve() / "build.ninja")]
    command += ["-v"] if verbose else []
    subprocess.run(command, check=True, cwd=ROOT, env=_compiler_environment())
    libraries = [output / name for name in (LIBRARY, KERNELS_LIBRARY, ONNXRUNTIME_LIBRARY)]
    built = [*libraries, output / f"_C{target.extension_suffix}"]
    if extension_only:
        return built
    if target.cuda is not None or target.emulate_cuda:
        return [*built, output / CUDA_LIBRARY]
    (output / CUDA_LIBRARY).unlink(missing_ok=True)  # of an earlier build: it would not fit any more
    return built


def stage(target: Target, folder: Path, prebuilt: Path | None = None) -> None:
    """Puts an importable copy of the package, with its own binaries, into ``folder``.

    Args:
        prebuilt: a folder with libraries that fit, of which ``_C`` alone is not taken: it is for one Python.
    """
    package = folder / "effattn"
    if package.exists():
        shutil.rmtree(package)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "effattn", package, ignore=ignored)
    shutil.copytree(ROOT / "kernels" / "triton", package / "_triton", ignore=ignored, dirs_exist_ok=True)
    if prebuilt is not None:
        (folder / "lib").mkdir(parents=True, exist_ok=True)
        for library in prebuilt.glob("libeffattn*.so"):
            shutil.copy2(library, folder / "lib" / library.name)
    build(target, folder / "lib", folder / "objects", extension_only=prebuilt is not None)
    for binary in (folder / "lib").glob("*.so"):
        shutil.copy2(binary, package / binary.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=Path, required=True, help="folder that receives the copy")
    parser.add_argument("--sanitize", default="", help="value for -fsanitize=")
    parser.add_argument("--emulate-cuda", action="store_true", help="the CUDA kernels, compiled for the host")
    parser.add_argument("--without", nargs="*", default=[], help="instruction sets to leave out")
    cross = parser.add_argument_group("cross-compiling, all or none")
    cross.add_argument("--architecture")
    cross.add_argument("--compiler")
    cross.add_argument("--torch-include", type=Path)
    cross.add_argument("--torch-lib", type=Path)
    cross.add_argument("--torch-version")
    cross.add_argument("--python-include", type=Path)
    cross.add_argument("--tag", dest="extension_suffix")
    arguments = vars(parser.parse_args())
    folder = arguments.pop("stage")
    options = {"sanitize": arguments.pop("sanitize"), "without": tuple(arguments.pop("without"))}
    options["emulate_cuda"] = arguments.pop("emulate_cuda")
    given = {name: value for name, value in arguments.items() if value is not None}
    if given and len(given) != len(arguments):
        parser.error("cross-compiling needs all of its options")
    target = Target(**given, **options) if given else Target.native(**options)
    stage(target, folder)


if __name__ == "__main__":
    main()
