"""The example of onnxruntime and OpenVINO: exported, built as its README says, and run where there is no Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from same import allowed

from effattn import onnxruntime as for_onnxruntime

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "engines"
SIZE = 64
#: Of onnxruntime, for C++: the pip package has no headers.
INCLUDE = os.environ.get("EFFATTN_TEST_ONNXRUNTIME_INCLUDE")
LIBRARY = os.environ.get("EFFATTN_TEST_ONNXRUNTIME_LIBRARY")

pytestmark = pytest.mark.full


def call(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder, *options):
    # pip's cmake lies beside this Python, whose folder need not be in PATH.
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert cmake is not None, "cmake is missing: `pip install cmake`"
    call(cmake, "-S", EXAMPLE, "-B", folder, *options)
    call(cmake, "--build", folder)


def save(path, values):
    np.ascontiguousarray(values).tofile(path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    pytest.importorskip("onnxscript", reason="of the test extra: make test installs it")
    printed = call(
        sys.executable, EXAMPLE / "export.py", "--model", "efficientvit_b0", "--size", SIZE, "--output", folder
    )
    assert re.search(r"with nodes of effattn: 4 \w+$", printed, re.M)
    return folder


@pytest.fixture(params=["openvino", "onnxruntime"])
def program(request, tmp_path):
    """Built; with effattn's library for the engine, and the name of one that is not."""
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="openvino is a peer that make bench installs")
        from openvino.utils import get_cmake_path

        from effattn import openvino as for_openvino

        library, entry = for_openvino.library(), "create_extensions"
        build(tmp_path / "build", f"-DOpenVINO_DIR={get_cmake_path()}")
    else:
        if not (INCLUDE and LIBRARY):
            pytest.skip("onnxruntime for C++ is a release of onnxruntime that EFFATTN_TEST_ONNXRUNTIME_LIBRARY names")
        library, entry = for_onnxruntime.library(), "RegisterCustomOps"
        build(tmp_path / "build", f"-DONNXRUNTIME_INCLUDE={INCLUDE}", f"-DONNXRUNTIME_LIBRARY={LIBRARY}")
    return tmp_path / "build" / f"classify_{request.param}", library, entry


def test_model_runs_without_python(exported, program, tmp_path):
    classify, library, entry = program
    model, image, expected = (exported / name for name in ("model.onnx", "input.bin", "expected.bin"))
    # No PATH, no PYTHONPATH; more threads would wait for those of other tests.
    bare = {"TMPDIR": str(tmp_path)}

    log = {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(tmp_path / "loaded")}
    printed = call(classify, library, model, image, expected, 1, env=bare | log)
    (loaded,) = (path.read_text() for path in tmp_path.glob("loaded.*"))
    assert library.name in loaded and "libeffattn_kernels.so" in loaded
    assert not re.search(r"libpython|libtorch", loaded)
    answer = np.fromfile(expected, np.float32).reshape(2, -1)
    assert [int(n) for n in re.findall(r"class (\d+)", printed)] == answer.argmax(1).tolist()
    assert float(re.search(r"largest difference.*: (\S+)", printed)[1]) <= allowed(torch.float32)
    assert re.search(r"time of a run: \S+ ms, the median of 21, threads: 1\n", printed)

    images = np.fromfile(image, np.float32).reshape(2, 3, SIZE, SIZE)
    one, answer_of_one = save(tmp_path / "one.bin", images[1:]), save(tmp_path / "answer_of_one.bin", answer[1:])
    printed = call(classify, library, model, one, answer_of_one, env=bare)  # as many threads as the engine likes
    assert re.findall(r"class (\d+)", printed) == [str(answer[1].argmax())]

    def message(library=library, model=model, input=image, answer=expected, threads=1):
        command = [str(part) for part in (classify, library, model, input, answer, threads)]
        done = subprocess.run(command, capture_output=True, text=True, env=bare)
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"{classify.name}: " in done.stderr
        return done.stderr

    missing = tmp_path / "missing"
    assert re.search(f"(?s)LIBRARY {missing}: .*No such file", message(library=missing))
    assert re.search(f"(?s)LIBRARY {image}: .*invalid ELF header", message(library=image))
    kernels = for_onnxruntime.library().with_name("libeffattn_kernels.so")
    assert re.search(f"(?s)LIBRARY {kernels}: .*undefined symbol: {entry}", message(library=kernels))
    assert f"MODEL {missing}: " in message(model=missing)
    assert f"MODEL {image}: " in message(model=image)
    assert f"INPUT {missing}: No such file" in message(input=missing)
    assert f"INPUT {EXAMPLE}: " in message(input=EXAMPLE)
    small = save(tmp_path / "small.bin", images[:, :, :48, :48])
    wanted, given = images[0].size, small.stat().st_size // 4
    assert f"INPUT {small}: expected images of {wanted} numbers, as the model takes, got {given}" in message(
        input=small
    )
    odd = save(tmp_path / "odd.bin", np.frombuffer(image.read_bytes()[:-1], np.uint8))
    assert f"INPUT {odd}: expected numbers of 4 bytes, got {2 * 4 * wanted - 1} bytes" in message(input=odd)
    empty = save(tmp_path / "empty.bin", images[:0])
    assert f"INPUT {empty}: expected numbers of 4 bytes, got 0 bytes" in message(input=empty)
    assert f"EXPECTED {missing}: No such file" in message(answer=missing)
    assert f"EXPECTED {answer_of_one}: expected 2 x 1000 numbers, as the model gives, got 1000" in message(
        answer=answer_of_one
    )
    one_nan = np.where(np.arange(answer.size).reshape(answer.shape) == 7, np.float32(np.nan), answer)
    for name, other in (("other.bin", answer[::-1]), ("nan.bin", one_nan)):
        wrong = save(tmp_path / name, other)
        assert f"EXPECTED {wrong}: expected a difference of at most 0.0001, got " in message(answer=wrong)
    for threads in ("0", "1x", "many"):
        assert f"THREADS {threads}: expected a number of at least 1" in message(threads=threads)

    usage = subprocess.run([str(classify), str(model)], capture_output=True, text=True, env=bare)
    assert usage.returncode == 2 and usage.stderr == f"usage: {classify.name} LIBRARY MODEL INPUT EXPECTED [THREADS]\n"


def test_without_an_engine(tmp_path):
    """cmake says what is missing."""
    nowhere = ["-DCMAKE_DISABLE_FIND_PACKAGE_OpenVINO=ON", "-DONNXRUNTIME_INCLUDE=", "-DONNXRUNTIME_LIBRARY="]
    with pytest.raises(AssertionError, match=r"Neither OpenVINO \(OpenVINO_DIR\) nor onnxruntime"):
        build(tmp_path, *nowhere, "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", "16"], "--size: expected at least 32, got 16"),
        (["--model", "efficientvit_m0", "--size", "64"], "--size: expected 224 for efficientvit_m0, got 64"),
        (["--output", __file__], "--output: expected a folder, got the file"),
    ],
)
def test_export_refuses(options, message):
    done = subprocess.run([sys.executable, str(EXAMPLE / "export.py"), *options], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
