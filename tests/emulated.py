"""Compiles the CUDA kernels for the host, with AddressSanitizer and UBSan, and runs the tests of cards on it.

    python tests/emulated.py [pytest arguments]

Each thread of a block is a fiber, shared memory has the size that a launch says and is full of NaN
(kernels/cuda/core/emulated/emulator.h). All tests run as on a GPU of 9.0, with clusters; then some as on one of 8.0,
without, where the last thread of a block goes first: a missing barrier would show.
"""

from __future__ import annotations

import sys

from staged import ROOT, instruction_sets, run, stage

STAGE = ROOT / "build" / "emulated"
TESTS = ["tests/device", "-m=not gpu"]
#: A run on a card, of which these kernels are the CUDA backend.
REHEARSAL = "tests/test_gpu_run.py::test_a_rehearsal_of_emulated_kernels"
BACKWARDS = {"EFFATTN_EMULATOR_ORDER": "backwards", "EFFATTN_EMULATED_CAPABILITY": "80"}


def main() -> int:
    # Nothing runs on the CPU's own kernels but what asks for an instruction set.
    wider = [name for name in instruction_sets() if name not in ("baseline", "neon")]
    stage(STAGE, "--emulate-cuda", "--without", *wider)
    if sys.argv[1:]:
        return run(STAGE, sys.argv[1:])
    return (
        run(STAGE, [REHEARSAL]) or run(STAGE, TESTS) or run(STAGE, [*TESTS, "-k=float64 or several_parts"], BACKWARDS)
    )


if __name__ == "__main__":
    sys.exit(main())
