"""Builds the native code with AddressSanitizer and UBSan and runs the tests marked numerics or arguments on it.

    python tests/sanitizers.py [--full] [pytest arguments]

One instruction set, unless ``--full`` asks for all.
"""

from __future__ import annotations

import sys

from staged import ROOT, all_but_the_widest, instruction_sets, marked, run, stage

STAGE = ROOT / "build" / "sanitizers"
FULL = "--full"


def spare_isas() -> list[str]:
    """avx2_wide is there to run the logic of avx512 where the processor has none; one of the two will do."""
    rows = instruction_sets()
    return [] if not {"avx512", "avx2_wide"} <= rows.keys() else ["avx2_wide" if rows["avx512"] else "avx512"]


def main() -> int:
    tier = [FULL] if FULL in sys.argv else []
    arguments = [argument for argument in sys.argv[1:] if argument != FULL]
    stage(STAGE, "--without", *(spare_isas() if tier else all_but_the_widest()))
    default = [*marked("numerics", "arguments"), "-m=(numerics or arguments) and not slow"]
    return run(STAGE, [*tier, *(arguments or default)])


if __name__ == "__main__":
    sys.exit(main())
