"""Too little memory is an error, and no end of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

OUT_OF_MEMORY = """
import resource, torch
from effattn import relu_linear_attention
t = torch.ones(3, 1, 2**14)
relu_linear_attention(t[:, :, :4], t[:, :, :4], t[:, :, :4])  # threads have their stacks now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
try:
    relu_linear_attention(t, t, t)  # kv_state of 1 GiB
except RuntimeError as error:
    assert "effattn: cannot allocate" in str(error), error
    assert relu_linear_attention(t[:, :, :4], t[:, :, :4], t[:, :, :4]).eq(1).all()
    print("refused")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory as Linux does")
def test_too_little_memory_is_a_runtime_error():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
