"""Compiles the CUDA kernels for the host, with AddressSanitizer and UBSan, and runs the tests of GPUs on it.

    python tests/emulated.py [--full] [pytest arguments]

Each thread of a block is a fiber, shared memory has the size that a launch says and is full of NaN
(kernels/cuda/core/emulated/emulator.h). All tests run as on a GPU of 9.0, with clusters; with ``--full``, those marked
numerics then run as on one of 8.0, without, where the last thread of a block goes first: a missing barrier would show.
"""

from __future__ import annotations

import sys

from staged import ROOT, all_but_the_widest, marked, run, stage

STAGE = ROOT / "build" / "emulated"
FULL = "--full"
TESTS = ["tests/device", "tests/conformance", *marked("emulated")]
TESTED = {"EFFATTN_TESTED_BACKEND": "cuda"}
BACKWARDS = TESTED | {"EFFATTN_EMULATOR_ORDER": "backwards", "EFFATTN_EMULATED_CAPABILITY": "80"}


def main() -> int:
    tier = [FULL] if FULL in sys.argv else []
    arguments = [argument for argument in sys.argv[1:] if argument != FULL]
    # Nothing runs on the CPU's own kernels but what asks for an instruction set: the one of the sanitizers' short tier,
    # so that the two builds share objects.
    stage(STAGE, "--emulate-cuda", "--without", *all_but_the_widest())
    if arguments:
        return run(STAGE, [*tier, *arguments], TESTED)
    status = run(STAGE, [*tier, *TESTS, "-m=emulated and not gpu"], TESTED)
    if status or not tier:
        return status
    return run(STAGE, [*tier, *TESTS, "-m=emulated and numerics and not gpu"], BACKWARDS)


if __name__ == "__main__":
    sys.exit(main())
