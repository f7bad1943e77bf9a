"""Modules over the functions: state dicts of timm and of the official repositories load unchanged."""

from __future__ import annotations

from effattn.nn.lite_mla import LiteMLA

__all__ = ["LiteMLA"]
