"""multi_scale_aggregation and multi_scale_linear_attention, launched."""

from __future__ import annotations

from effattn.backends.triton._launch import Launchers

LAUNCHERS = {
    "multi_scale_aggregation": Launchers("multi_scale", "aggregate", "aggregate_backward"),
    "multi_scale_linear_attention": Launchers("multi_scale", "attend", "attend_backward"),
}
