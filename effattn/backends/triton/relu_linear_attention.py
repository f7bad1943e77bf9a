"""relu_linear_attention, launched."""

from __future__ import annotations

from effattn.backends.triton._launch import Launchers

LAUNCHERS = {"relu_linear_attention": Launchers("linear_attention")}
