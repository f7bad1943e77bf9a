"""The entry points of biased_attention; without talking heads they call kernels/triton/biased_attention.py."""

from __future__ import annotations

from effattn._triton.configs import MAX_TALKING_HEADS
from effattn.backends.triton._launch import Launchers

LIMITS = {"talking_heads": MAX_TALKING_HEADS}
LAUNCHERS = {"biased_attention": Launchers("biased_attention_talking_heads")}
