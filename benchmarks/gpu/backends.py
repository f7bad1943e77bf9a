"""Which backends for GPUs can be used here, what their kernels are made of, all cases, and which of them come first:
one process tells."""

from __future__ import annotations

import torch

from benchmarks.gpu import cases, child, names
from benchmarks.gpu.case import all_cases, source
from benchmarks.gpu.lines import Status
from benchmarks.gpu.smoke import device_of
from effattn import _library, registry, verdicts

NAME = "backends"


def main() -> None:
    child.start()
    child.begin(NAME)
    reasons = {status.name: status.reason for status in registry.backends() if status.name in names.BACKENDS}
    gpu, driver = verdicts.gpu_and_driver(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    child.finish(
        NAME,
        Status.OK if _library.error is None else Status.ERROR,
        unavailable={name: reason for name, reason in reasons.items() if reason is not None},
        devices={name: device_of(name).type for name, reason in reasons.items() if reason is None},
        identities={name: verdicts.identity(name) for name in reasons},
        verdicts_of=[gpu, driver],
        cases=[cases.name_of(case) for case in all_cases()],
        main=source().MAIN,
        profiled=source().PROFILED,
        smoke=list(source().SMOKE),
        operators=source().OPERATOR_OF,
        **({} if _library.error is None else {"reason": _library.error}),
    )


if __name__ == "__main__":
    main()
