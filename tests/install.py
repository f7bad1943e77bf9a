"""Installs effattn in every way that is offered and uses it from outside of the repository.

    python tests/install.py

The wheel is built from the sdist, so that a file missing from either is found; the editable install is
the one of the environment that runs this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

USE = """
import copy, sys, pathlib, torch, effattn
from effattn import _C
from effattn.ops import OPERATORS
from effattn.testing import make_arguments
from effattn.tolerance import check_against
for operator in OPERATORS.values():
    image, *rest = make_arguments(operator, operator.cases[0])
    out = operator(image.requires_grad_(), *rest)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    assert image.grad.isfinite().all() and not image.grad.eq(0).all()
assert {"cpu", "reference"} <= {b.name for b in effattn.backends() if b.available}
package = pathlib.Path(effattn.__file__).parent
from effattn._triton import configs  # lies elsewhere in the repository
from effattn.backends import triton
assert any((pathlib.Path(configs.__file__).parent / f"{name}.py").exists() for name in triton.LAUNCHERS)
assert (package / "py.typed").exists()
cuda = next(b for b in effattn.backends() if b.name == "cuda")
assert ("is not compiled in" not in (cuda.reason or "")) == bool(int(sys.argv[3])), cuda
model = torch.nn.Sequential(effattn.nn.LiteMLA(16, 16, dim=8)).eval()
image = torch.randn(1, 16, 6, 6)
exported = effattn.export.to_onnx(model, image, input_names=["x"]).model
(in_onnxruntime,) = effattn.onnxruntime.session(exported).run(None, {"x": image.numpy()})
in_openvino = effattn.openvino.compile(exported, config={"INFERENCE_PRECISION_HINT": "f32"})(image.numpy())[0]
exact = copy.deepcopy(model).double()
with torch.no_grad():
    for out in (in_onnxruntime, in_openvino):
        check_against(lambda: {"out": exact(image.double())}, {"out": torch.from_numpy(out)}, longest_sum=36)  # tokens
print(f"{sys.argv[1]}: effattn {effattn.__version__} in {package.name}, {_C.active_isa()}")
inside = package.is_relative_to(sys.argv[2])
assert inside == (sys.argv[1] == "editable"), package
"""


def run(*command: str | Path, cwd: Path) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=cwd)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # As the editable install was built (Makefile), so that the compiler cache has what the wheel is made of.
        has_cuda = os.environ.setdefault("EFFATTN_CUDA", str(int(shutil.which("nvcc") is not None)))
        run(sys.executable, "-c", USE, "editable", ROOT, has_cuda, cwd=folder)
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, ROOT, cwd=folder)
        (sdist,) = folder.glob("effattn-*.tar.gz")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, sdist, cwd=folder)
        (wheel,) = folder.glob("effattn-*.whl")
        assert "none-any" not in wheel.name, "a wheel with binaries names its platform"
        # In front of the editable install, behind nothing.
        target = folder / "site"
        run(*pip, "install", "--no-deps", "--target", target, wheel, cwd=folder)
        names = sorted(path.name for path in target.iterdir() if not path.name.endswith(".dist-info"))
        assert names == ["effattn"], names
        check = f"import sys; sys.path.insert(0, {str(target)!r})\n{USE}"
        run(sys.executable, "-c", check, "wheel", ROOT, has_cuda, cwd=folder)


if __name__ == "__main__":
    main()
