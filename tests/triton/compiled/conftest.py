"""Every kernel as it is launched, compiled ahead of time for GPUs that need not be there; a file an operator.

Each is compiled for its smallest and largest heads, and for those of the models, in both memory orders; in the short
tier for the largest and one of the models. Of the main kernels there are budgets for sm_90, an instance each, read from
the machine code: what the compiler makes of a loop is a static count, and branches that are not taken are in it.
"""

from __future__ import annotations

import pytest


@pytest.fixture
def compiled(monkeypatch, target):
    """What launches compile for the target, in order; nothing runs."""
    from no_gpu import compile_only

    from effattn.backends.triton import is_interpreted

    if is_interpreted():
        pytest.skip("the interpreter compiles nothing")
    return compile_only(monkeypatch, target)
