"""How the package is put together: import direction, registry, instruction sets, information."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import effattn
from effattn import _library, registry
from effattn.backends import cuda, triton
from effattn.backends._base import beyond
from effattn.ops import INFERENCE_OPERATORS, OPERATORS
from effattn.testing import make_arguments

_C = _library._C
PACKAGE = Path(effattn.__file__).parent
ROOT = Path(__file__).resolve().parent.parent

# Who imports whom, top to bottom, beside itself.
IMPORTS = {
    "_cache": set(),
    "_library": set(),
    "_tracing": set(),
    "backends": {"_cache", "_library", "_tracing", "_triton"},
    "_triton": set(),
    "registry": {"backends", "verdicts"},
    "verdicts": {"backends", "_library", "_tracing"},
    "ops": {"registry", "backends", "_cache", "_library", "_tracing"},
    "functional": {"ops", "_tracing"},
    "nn": {"functional", "ops", "_library", "_tracing"},
    "integrations": {"functional", "nn", "ops"},
    "export": {"__init__", "integrations", "nn", "ops", "_library", "_tracing"},
    "onnxruntime": {"_library"},
    "openvino": {"_library"},
    "testing": {"ops"},
    "tolerance": set(),
    "__main__": {"export", "registry", "testing", "_library", "__init__"},
    "__init__": {"_library", "functional", "integrations", "nn", "registry"},
}


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "effattn":
                known = len(pieces) > 1 and pieces[1] in IMPORTS
                parts.add(pieces[1] if known else "__init__")
    return parts


def sources():
    """Every part of the package with its files; the kernels lie elsewhere before they are installed."""
    for path in PACKAGE.rglob("*.py"):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path
    for folder in importlib.util.find_spec("effattn._triton").submodule_search_locations:
        for path in Path(folder).glob("*.py"):
            yield "_triton", path


def test_imports_go_one_way():
    imported = {}
    for part, path in sources():
        imported.setdefault(part, set()).update(imported_parts(path) - {part})
    assert imported == IMPORTS


@pytest.mark.skipif(not (PACKAGE.parent / "kernels").exists(), reason="sources are not installed with the package")
def test_kernels_know_no_torch():
    for path in (PACKAGE.parent / "kernels").rglob("*"):
        if path.suffix in (".h", ".cpp"):
            assert "torch/" not in path.read_text(), path


#: By operator, what its own files are called, if not by its name.
OWN = {
    "multi_scale_linear_attention": ("multi_scale",),
    "multi_scale_aggregation": ("multi_scale",),
    "cascaded_group_attention": ("cascade_params", "cascade_training", "cascade_projected", "cascade"),
    "cascaded_group_attention_batch_norm": ("cascade_training",),
    "cascaded_group_attention_projected": ("cascade_projected",),
    "block": ("blocks", "_blocks"),
}
#: Prose, which names operators where it speaks of them.
PROSE = ("docs/", "mkdocs.yml", "benchmarks/results/", "benchmarks/NOTES.md")


def is_own(path: str, name: str) -> bool:
    """Whether a folder or the file is the operator's, or that of tests of a part of it."""
    parts = [part.split(".")[0].removeprefix("test_") for part in Path(path).parts]
    return any(part == own or parts[-1].startswith(f"{own}_") for own in (name, *OWN.get(name, ())) for part in parts)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="looks into a repository")
@pytest.mark.parametrize("name", [*OPERATORS, *INFERENCE_OPERATORS])
def test_few_files_but_its_own_name_an_operator(name):
    """What must be touched for one: its own files, and at most six that call it or are made of it."""
    # The operator, not a Python module of the same name: nn.lite_mla, benchmarks.lite_mla.
    is_module = (PACKAGE / "nn" / f"{name}.py").exists() and name in INFERENCE_OPERATORS
    pattern = rf'(effattn(::|\.)|"){name}\b|ops import {name}\b' if is_module else rf"\b{name}\b"
    command = ["git", "grep", "-lE", pattern]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    others = [path for path in found if not is_own(path, name) and not path.endswith(".md")]
    others = [path for path in others if not path.startswith(PROSE)]
    assert found and len(others) <= 6, others


def test_nothing_heavy_is_imported():
    script = (
        "import sys, effattn, torch; effattn.accelerate(torch.nn.ReLU());"
        f"launchers = 'effattn._triton.{OP}';"
        "heavy = {'timm', 'torchvision', 'diffusers', 'torch._dynamo', launchers, 'numpy.testing'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


OPERATOR = next(iter(OPERATORS.values()))
OP = OPERATOR.name
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def limited_sizes(operator, **larger):
    """The sizes of an operator's first case that may have limits, with others for those of the limits named."""
    sizes = operator.named_sizes(*make_arguments(operator, operator.cases[0]))
    return tuple(larger.get(name, size) for name, size in sizes)


def test_registry_prefers_the_kernels():
    for op in OPERATORS:
        assert registry.choose(op, CPU, torch.float32).name == "cpu"
        assert registry.choose(op, CPU, torch.float64).name == "reference"
        assert registry.choose(op, CUDA, torch.float16).name == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_serves_dtypes_of_which_there_are_no_kernels(name, dtype):
    operator = OPERATORS[name]
    arguments = make_arguments(operator, operator.cases[0], dtype)
    expected = "cpu" if dtype in operator.dtypes else "reference"
    assert registry.choose(name, CPU, dtype, operator.limited_sizes(*arguments)).name == expected
    out = operator(*arguments)
    assert (out[0] if isinstance(out, tuple) else out).dtype == dtype


def test_registry_gives_every_reason():
    with effattn.use_backend("cpu"), pytest.raises(RuntimeError) as error:
        registry.choose(OP, CUDA, torch.float64)
    assert "takes CPU tensors, not cuda; takes float32, bfloat16 and float16, not float64" in str(error.value)


def test_registry_names_what_triton_lacks(monkeypatch):
    """Reasons of this machine, of the op, the device, the dtype and the size, in one message."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    too_large = limited_sizes(OPERATOR, channels=200)
    with effattn.use_backend("triton"), pytest.raises(RuntimeError) as error:
        registry.find(OP, CPU, torch.float64, too_large)
    for reason in (
        "the package triton is not installed",
        "takes CUDA tensors, not cpu",
        "takes float32, bfloat16 and float16, not float64",
        "takes heads of up to 128 channels, not 200",
    ):
        assert reason in str(error.value)
    for name in set(OPERATORS) | set(INFERENCE_OPERATORS):
        if name not in triton.LAUNCHERS:
            with effattn.use_backend("triton"), pytest.raises(RuntimeError, match=f"has no {name}"):
                registry.find(name, CPU, torch.float32)


def test_registry_names_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, name in (((7, 5), "reference"), ((8, 0), "triton"), ((9, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert registry.find(OP, CUDA, torch.bfloat16).name == name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with effattn.use_backend("triton"), pytest.raises(RuntimeError, match=r"needs .* capability 8.0, this one has 7.5"):
        registry.find(OP, CUDA, torch.bfloat16)


@pytest.mark.skipif(_library.cuda_error is not None, reason="the CUDA library is not built")
def test_the_next_backend_serves_what_the_cuda_kernels_do_not_take(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "runs_on", lambda capability, archs: True)
    monkeypatch.setattr(cuda, "_driver_error", lambda: None)
    for op in cuda.OPERATORS:
        sizes = limited_sizes(OPERATORS[op])
        assert registry.find(op, CUDA, torch.float16, sizes).name == "cuda"
        for name, most in cuda.limits(op).items():
            at_most, beyond_it = (limited_sizes(OPERATORS[op], **{name: size}) for size in (most, most + 1))
            assert registry.find(op, CUDA, torch.float16, at_most).name == "cuda"
            assert registry.find(op, CUDA, torch.float16, beyond_it).name == "reference"


def test_limits_have_names():
    named = [(name, most) for limits in (cuda.limits(op) for op in OPERATORS) for name, most in limits.items()]
    for name, most in (*_library._C.limits.items(), *named):
        assert not beyond([(name, most)], {name: most})
        assert f"not {most + 1}" in beyond([(name, most + 1)], {name: most})[0]


def test_a_limit_that_nobody_has_words_for_is_called_by_its_name():
    assert beyond([("window_width", 65)], {"window_width": 64}) == ["takes a window width of up to 64, not 65"]
    assert beyond([("window_width", 64)], {"window_width": 64}) == []


def test_what_is_chosen_during_an_export_is_not_remembered(monkeypatch):
    """An exporter in another thread has every call take the reference, until it is done."""
    sizes = limited_sizes(OPERATOR, channels=7)
    with monkeypatch.context() as exporting:
        exporting.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        assert registry.choose(OP, CPU, torch.float16, sizes).name == "reference"
        assert not registry.choose_fused(OP, CPU, torch.float16)
    assert registry.choose(OP, CPU, torch.float16, sizes).name == "cpu"
    assert registry.choose_fused(OP, CPU, torch.float16)


def test_use_backend_of_several_threads_leaves_nothing_behind():
    """Blocks that overlap: the first one opened is closed first."""

    def hold(name: str, opened: threading.Event, close: threading.Event) -> None:
        with effattn.use_backend(name):
            opened.set()
            close.wait()

    def chosen() -> str:
        return registry.choose(OP, CPU, torch.float32).name

    threads = []
    for name in ("reference", "cpu"):
        opened, close = threading.Event(), threading.Event()
        thread = threading.Thread(target=hold, args=(name, opened, close))
        thread.start()
        opened.wait()
        threads.append((thread, close))
        assert chosen() == name
    default = "cpu"
    for (thread, close), left in zip(threads, ("cpu", default), strict=True):
        close.set()
        thread.join()
        assert chosen() == left
    assert registry._forced is None and not registry._blocks


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_use_backend_in_a_compiled_function(backend):
    def attend(x, bias):
        with effattn.use_backend(backend):
            return effattn.biased_attention(x, x, x, bias)

    x, bias = torch.randn(1, 2, 5, 8), torch.randn(2, 5, 5)
    nodes = []

    def recorded(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(attend, fullgraph=True, backend=recorded)
    for _ in range(2):
        assert torch.equal(compiled(x, bias), attend(x, bias))
        assert registry.find("biased_attention", CPU, torch.float32).name == "cpu"
    assert any("effattn" in node for node in nodes) is (backend == "cpu")


def test_use_backend_nests_and_recovers():
    with pytest.raises(RuntimeError, match="inside"), effattn.use_backend("reference"):
        with effattn.use_backend("cpu"):
            assert registry.choose(OP, CPU, torch.float32).name == "cpu"
        assert registry.choose(OP, CPU, torch.float32).name == "reference"
        raise RuntimeError("inside")
    assert registry.choose(OP, CPU, torch.float32).name == "cpu"
    with pytest.raises(
        ValueError, match="use_backend: expected one of 'cpu', 'triton', 'cuda', 'reference', got 'gpu'"
    ):
        effattn.use_backend("gpu").__enter__()


#: A call that needs a backend.
CALL = (
    "import torch; from effattn.ops import OPERATORS; from effattn.testing import make_arguments;"
    "operator = next(iter(OPERATORS.values())); arguments = make_arguments(operator, operator.cases[0]);"
    "operator(*arguments)"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_backend_from_the_environment():
    code = f"import effattn, torch;print(effattn.registry.choose({OP!r}, torch.device('cpu'), torch.float32).name)"
    assert run(code, EFFATTN_BACKEND="reference").stdout.strip() == "reference"
    wrong = run(code, EFFATTN_BACKEND="quick")
    assert wrong.returncode != 0
    assert "EFFATTN_BACKEND: expected one of 'cpu', 'triton', 'cuda', 'reference', got 'quick'" in wrong.stderr


def test_instruction_set_from_the_environment():
    code = "import effattn; from effattn import _C; print(_C.active_isa())"
    narrow = _C.isas()[0]["name"]
    assert run(code, EFFATTN_CPU_ISA=narrow).stdout.strip() == narrow
    wrong = run(CALL, EFFATTN_CPU_ISA="mmx")
    assert wrong.returncode == 1  # an exception, not a signal
    assert "EFFATTN_CPU_ISA: no instruction set 'mmx' can be used here; compiled in: " in wrong.stderr


def test_the_widest_supported_set_is_picked():
    names = [row["name"] for row in _C.isas() if row["supported"] and not row["test_only"]]
    code = "import effattn; from effattn import _C; print(_C.active_isa())"
    assert run(code, EFFATTN_CPU_ISA="").stdout.strip() == names[-1]
    with pytest.raises(RuntimeError, match="set_isa: no instruction set 'mmx'"):
        _C.set_isa("mmx")


def test_a_missing_library_leaves_the_reference(tmp_path):
    """A broken installation still computes, warns once, and says why."""
    import shutil

    shutil.copytree(PACKAGE, tmp_path / "effattn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"{CALL}\n"
        "import effattn\n"
        "assert effattn.__file__.startswith(sys.path[0])\n"
        "assert torch.equal(operator(*arguments), operator.plain(*arguments))\n"
        "cpu, triton, cuda, reference = effattn.backends()\n"
        "assert 'libeffattn.so' in cpu.reason and not cpu.available and reference.available\n"
        "assert not triton.available\n"
        "try:\n"
        "    with effattn.use_backend('cpu'): operator(*arguments)\n"
        "except RuntimeError as error: assert 'libeffattn.so' in str(error)\n"
        "else: raise AssertionError\n"
        "from effattn.__main__ import main; main(['info'])\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "the plain PyTorch reference serves instead" in result.stderr
    assert "libeffattn.so" in result.stdout


def test_info_explains_an_instruction_set_that_is_not_there():
    environment = {**os.environ, "EFFATTN_CPU_ISA": "mmx"}
    command = [sys.executable, "-m", "effattn", "info"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "in use: none" in text and "mmx" in text


def test_info():
    text = subprocess.run([sys.executable, "-m", "effattn", "info"], capture_output=True, text=True, check=True).stdout
    assert effattn.__version__ in text and torch.__version__ in text
    for row in _C.isas():
        assert row["name"] in text
    assert f"in use: {_C.active_isa()}" in text
    assert "reference" in text
    wrong = subprocess.run([sys.executable, "-m", "effattn", "nonsense"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "usage" in wrong.stderr


def test_version_is_written_once():
    from importlib.metadata import version

    assert version("effattn") == effattn.__version__
