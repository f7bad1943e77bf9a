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

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "sanitizers"
DEFAULT = [
    "tests/test_relu_linear_attention_numerics.py",
    "tests/test_relu_linear_attention_errors.py",
    # Threads of torch's pool are not instrumented; what they compute is covered by the rest.
    "-k=not float16_in_its_whole_range and not float16_activations and not same_bits",
]


def runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    subprocess.run(
        [sys.executable, "csrc/build.py", "--stage", str(STAGE), "--sanitize", "address,undefined"],
        check=True,
        cwd=ROOT,
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(STAGE),
        "PYTHONMALLOC": "malloc",
    }
    check = "import effattn._C as c; print(c.__file__); assert c.build['sanitizer'] == 'address,undefined', c.build"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=STAGE, env=environment)
    arguments = sys.argv[1:] or DEFAULT
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments], cwd=ROOT, env=environment
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
