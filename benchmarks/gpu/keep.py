"""Puts the verdicts of a run where the registry looks for them: ``python -m benchmarks.gpu.keep FILE TRIED AGAIN``.

TRIED are the kernels that were tried, AGAIN those of them that were so twice, as JSON. What an earlier run said of
them, made of the same sources, on this GPU with this driver, is forgotten.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.lines import Status
from benchmarks.gpu.names import Kernel, operator_of
from effattn import verdicts
from effattn.verdicts import Verdict


def merged(
    old: Sequence[Verdict], new: Sequence[Verdict], tried: Sequence[Kernel], gpu: str, driver: str
) -> list[Verdict]:
    """The old ones that still count, and the new ones."""

    def is_forgotten(v: Verdict) -> bool:
        is_same = (v.gpu, v.driver, v.identity) == (gpu, driver, verdicts.identity(v.backend))
        return is_same and is_of(v, tried)

    return list(dict.fromkeys([*(v for v in old if not is_forgotten(v)), *new]))


def is_of(v: Verdict, kernels: Sequence[Kernel]) -> bool:
    """Whether a verdict is that of one of these."""
    them = {(operator_of(k), k.backend, k.dtype, k.direction) for k in kernels}
    return (v.operator, v.backend, v.dtype, v.direction) in them


def is_sure(v: Verdict, again: Sequence[Kernel]) -> bool:
    """Without a second try a timeout or an error counts for its run alone: what ran beside it may have caused it."""
    return v.status in (Status.WRONG, Status.CRASHED) or is_of(v, again)


def main() -> None:
    source = Path(sys.argv[1])
    tried, again = ([Kernel(*kernel) for kernel in json.loads(text)] for text in sys.argv[2:])
    target = verdicts.default_path()
    old = verdicts.read(target) if target.exists() else []
    gpu, driver = verdicts.gpu_and_driver(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sure = [v for v in verdicts.read(source) if is_sure(v, again)]
    found = merged(old, sure, tried, gpu, driver)
    if found or old:
        verdicts.write(target, found)
    print(f"{target}: {len(found)} verdicts")


if __name__ == "__main__":
    main()
