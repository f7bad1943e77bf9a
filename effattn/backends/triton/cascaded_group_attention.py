"""cascaded_group_attention, launched."""

from __future__ import annotations

from effattn.backends.triton._launch import Launchers

LAUNCHERS = {"cascaded_group_attention": Launchers("cascaded_group_attention")}
