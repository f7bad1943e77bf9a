"""squared_relu, launched."""

from __future__ import annotations

from effattn.backends.triton._launch import Launchers

LAUNCHERS = {"squared_relu": Launchers("squared_relu")}
