"""Builds the native code with AddressSanitizer and UBSan and runs the numeric tests on it.

python tests/sanitizers.py [pytest arguments]
"""

from __future__ import annotations

import sys

from staged import ROOT, instruction_sets, run, stage

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


def spare_isas() -> list[str]:
    """avx2_wide is there to run the logic of avx512 where the processor has none; one of the two will do."""
    rows = instruction_sets()
    return [] if not {"avx512", "avx2_wide"} <= rows.keys() else ["avx2_wide" if rows["avx512"] else "avx512"]


def main() -> int:
    stage(STAGE, "--without", *spare_isas())
    return run(STAGE, sys.argv[1:] or DEFAULT)


if __name__ == "__main__":
    sys.exit(main())
