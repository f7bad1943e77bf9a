"""Builds the native code with AddressSanitizer and UBSan and runs the tests marked numerics or arguments on it.

    python tests/sanitizers.py [--full] [pytest arguments]

One instruction set, unless ``--full`` asks for all.
"""

from __future__ import annotations

import sys

from staged import ROOT, all_but_the_widest, marked, run, stage, unsupported

STAGE = ROOT / "build" / "sanitizers"
FULL = "--full"


def main() -> int:
    tier = [FULL] if FULL in sys.argv else []
    arguments = [argument for argument in sys.argv[1:] if argument != FULL]
    stage(STAGE, "--without", *(unsupported() if tier else all_but_the_widest()))
    default = [*marked("numerics", "arguments"), "-m=(numerics or arguments) and not slow and not registration"]
    return run(STAGE, [*tier, *(arguments or default)])


if __name__ == "__main__":
    sys.exit(main())
