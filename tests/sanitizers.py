"""Builds the native code with AddressSanitizer and UBSan and runs the numeric tests on it.

    python tests/sanitizers.py [pytest arguments]

The interpreter is not instrumented, so the sanitizers' runtimes are preloaded. Python itself leaks by
design, so leaks are not looked for; everything else aborts the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from effattn import _C

# Imports the instrumented package before pytest can put any other folder on the path, so that the build in the
# repository can never be what is tested.
RUN_TESTS = """
import sys, effattn._C
build = effattn._C.build
if build["sanitizer"] != "address,undefined":
    sys.exit(f"sanitizers: imported {effattn._C.__file__}, a build with {build['sanitizer'] or 'none'}")
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "sanitizers"
DEFAULT = [
    "tests/test_relu_linear_attention_numerics.py",
    "tests/test_relu_linear_attention_errors.py",
    "tests/test_multi_scale_numerics.py",
    "tests/test_multi_scale_errors.py",
    "tests/test_lite_mla.py",
    "tests/test_softmax_attention_numerics.py",
    "tests/test_softmax_attention_errors.py",
    "tests/test_projected_attention.py",
    "tests/test_cascade_training.py",
    "tests/test_images.py",
    "-m=not slow",
    # Converted by the same code as float16; test_images has that of no other name.
    "-k=not ((multi_scale or softmax or projected) and bfloat16)",
]


def runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def spare_isas() -> list[str]:
    """avx2_wide is there to run the logic of avx512 where the processor has none; one of the two will do."""
    rows = {row["name"]: row["supported"] for row in _C.isas()}
    return [] if not {"avx512", "avx2_wide"} <= rows.keys() else ["avx2_wide" if rows["avx512"] else "avx512"]


def main() -> int:
    command = [sys.executable, "csrc/build.py", "--stage", str(STAGE), "--sanitize", "address,undefined"]
    subprocess.run([*command, "--without", *spare_isas()], check=True, cwd=ROOT)
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(STAGE),
        "PYTHONSAFEPATH": "1",  # not the current folder: it holds the ordinary build
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",  # one of pytest's processes a core; tests of threads ask for theirs
    }
    command = [sys.executable, "-c", RUN_TESTS, "-q", "-x", "-n", "auto", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *(sys.argv[1:] or DEFAULT)], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
