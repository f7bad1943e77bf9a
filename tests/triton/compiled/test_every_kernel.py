"""No kernel is left out by the files beside this one."""

from __future__ import annotations

import re
from pathlib import Path

KERNELS = Path(__file__).parents[3] / "kernels" / "triton"


def test_every_kernel_is_compiled_here():
    """A kernel that is launched stands in one of the lists."""
    launched = set()
    for path in KERNELS.glob("*.py"):
        launched |= set(re.findall(r"^\s+(_\w+)\[", path.read_text(), re.MULTILINE))
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(launched) >= 17
    assert all(f'"{name}"' in here for name in launched), launched
