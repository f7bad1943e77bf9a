"""The C++ example: exported, built as its README says, and run where there is no Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from same import allowed

from effattn._library import library_path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cpp"
TORCH = Path(torch.__file__).parent


def call(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder):
    # pip's cmake lies beside this Python, whose folder need not be in PATH.
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert cmake is not None, "cmake is missing: `pip install cmake`"
    call(cmake, "-S", EXAMPLE, "-B", folder, f"-DCMAKE_PREFIX_PATH={TORCH}")
    call(cmake, "--build", folder)
    return folder / "classify"


def operators_called(package):
    with zipfile.ZipFile(package) as archive:
        texts = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".json")]
    return re.findall(r'"(effattn::\w+)"', "".join(texts))


def save(path, tensor):
    torch.save(tensor.clone(), path)
    return path


@pytest.mark.full
def test_package_runs_without_python(tmp_path):
    exported = call(sys.executable, EXAMPLE / "export.py", "--size", "64", "--output", tmp_path)
    assert "the graph calls effattn.block.default 3 times" in exported
    model, image, expected = (tmp_path / name for name in ("model.pt2", "input.pt", "expected.pt"))
    called = operators_called(model)
    assert called == 3 * ["effattn::block"]
    program = build(tmp_path / "build")
    # No PATH, no PYTHONPATH. A package is unpacked into TMPDIR; threads would wait for those of other tests.
    bare = {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    log = {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(tmp_path / "loaded")}
    printed = call(program, library_path, model, image, expected, env=bare | log)
    (loaded,) = (path.read_text() for path in tmp_path.glob("loaded.*"))
    assert "libeffattn.so" in loaded and "libtorch_cpu.so" in loaded
    assert not re.search(r"libpython|libtorch_python", loaded)
    answer = torch.load(expected)
    assert [int(n) for n in re.findall(r"class (\d+)", printed)] == answer.argmax(1).tolist()
    assert float(re.search(r"largest difference.*: (\S+)", printed)[1]) <= allowed(torch.float32)
    assert re.search(r"time of a run: \S+ ms", printed)

    images = torch.load(image)
    one, answer_of_one = save(tmp_path / "one.pt", images[1:]), save(tmp_path / "answer_of_one.pt", answer[1:])
    call(program, library_path, model, one, answer_of_one, env=bare)

    def message(library=library_path, package=model, input=image, answer=expected):
        command = [str(part) for part in (program, library, package, input, answer)]
        done = subprocess.run(command, capture_output=True, text=True, env=bare)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr

    missing = tmp_path / "missing"
    assert re.search(f"LIBEFFATTN {missing}: .*No such file", message(library=missing))
    assert re.search(f"LIBEFFATTN {image}: .*invalid ELF header", message(library=image))
    assert "expected a library that registers effattn's operators" in message(library=TORCH / "lib" / "libc10.so")
    assert f"MODEL {missing}: " in message(package=missing)
    assert f"MODEL {image}: " in message(package=image)
    assert f"INPUT {missing}: No such file" in message(input=missing)
    assert f"INPUT {EXAMPLE}: " in message(input=EXAMPLE)
    assert f"INPUT {program}: " in message(input=program)
    small = save(tmp_path / "small.pt", images[:, :, :32, :32])
    assert re.search(f"MODEL {model}, run on INPUT {small}: .*expected: 64, but got: 32", message(input=small))
    double = save(tmp_path / "double.pt", images.double())
    assert re.search(f"MODEL {model}, run on INPUT {double}: .*unmatched dtype", message(input=double))
    assert f"EXPECTED {missing}: No such file" in message(answer=missing)
    assert re.search(
        f"EXPECTED {answer_of_one}: expected float .2, 1000., .*got float .1, 1000.", message(answer=answer_of_one)
    )
    for name, other in (("other.pt", answer.flip(0)), ("nan.pt", answer * torch.nan)):
        wrong = save(tmp_path / name, other)
        assert f"EXPECTED {wrong}: expected a difference of at most 0.0001, got " in message(answer=wrong)

    usage = subprocess.run([str(program), str(model)], capture_output=True, text=True, env=bare)
    assert usage.returncode == 2 and usage.stderr == "usage: classify LIBEFFATTN MODEL INPUT EXPECTED\n"
