"""After a pause the threads of torch's pool sleep, and a small call does not wait for them."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from effattn import relu_linear_attention
from effattn.testing import make_tensor

PAUSE = 0.1  # twice what csrc/cpu/backend.h takes for sleep
SMALL, LARGE = 196, 1 << 18  # tokens of 16 heads of 16: a tenth of a millisecond, and far above two

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells how long each thread has run")


def run_time_of_others() -> int:
    """Nanoseconds for which all threads but this one have run."""
    tasks = Path("/proc/self/task")
    return sum(
        int((task / "schedstat").read_text().split()[0])
        for task in tasks.iterdir()
        if int(task.name) != threading.get_native_id()
    )


def ran_beside(tokens: int, calls: int) -> bool:
    """Whether another thread runs for calls after a pause. It is counted when it sleeps again."""
    q = make_tensor(16, tokens, 16)
    relu_linear_attention(q, q, q)
    time.sleep(PAUSE)
    before = run_time_of_others()
    for _ in range(calls):
        relu_linear_attention(q, q, q)
    time.sleep(PAUSE)
    return run_time_of_others() > before


def test_a_small_call_after_a_pause_is_alone(threads):
    torch.set_num_threads(2)
    assert not ran_beside(SMALL, calls=1)
    assert ran_beside(SMALL, calls=2), "the second one shares its work"
    assert ran_beside(LARGE, calls=1)


@pytest.mark.parametrize("tokens", [SMALL, 3001])
def test_results_are_the_same_bits(threads, tokens):
    torch.set_num_threads(2)
    q = make_tensor(16, tokens, 16)
    time.sleep(PAUSE)
    alone = relu_linear_attention(q, q, q)
    assert torch.equal(alone, relu_linear_attention(q, q, q))
