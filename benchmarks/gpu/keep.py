"""Puts the verdicts of a run where the registry looks for them: ``python -m benchmarks.gpu.keep FILE KERNELS``.

KERNELS are those that were tried, as JSON. What an earlier run said of them, made of the same sources, on this card
with this driver, is forgotten.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.lines import Status
from benchmarks.gpu.names import Kernel
from effattn import verdicts
from effattn.verdicts import Verdict


def merged(
    old: Sequence[Verdict], new: Sequence[Verdict], tried: Sequence[Kernel], card: str, driver: str
) -> list[Verdict]:
    """The old ones that still count, and the new ones."""
    again = {(k.operator.split(" with ")[0], k.backend, k.dtype, k.direction) for k in tried}

    def is_forgotten(v: Verdict) -> bool:
        is_same = (v.card, v.driver, v.identity) == (card, driver, verdicts.identity(v.backend))
        return is_same and (v.operator, v.backend, v.dtype, v.direction) in again

    return list(dict.fromkeys([*(v for v in old if not is_forgotten(v)), *new]))


def main() -> None:
    source, tried = sys.argv[1:]
    target = verdicts.default_path()
    old = verdicts.read(target) if target.exists() else []
    card, driver = verdicts.card_and_driver(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    kernels = [Kernel(*kernel) for kernel in json.loads(tried)]
    # A timeout or an error may be the fault of what ran beside it: it counts for this run alone.
    sure = [v for v in verdicts.read(Path(source)) if v.status in (Status.WRONG, Status.CRASHED)]
    found = merged(old, sure, kernels, card, driver)
    if found or old:
        verdicts.write(target, found)
    print(f"{target}: {len(found)} verdicts")


if __name__ == "__main__":
    main()
