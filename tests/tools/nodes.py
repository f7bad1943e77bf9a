"""The operators of which there are nodes, and the attributes of one: for who calls the C interface, by any engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effattn import _library
from effattn.ops import OPERATORS
from effattn.ops._operator import Operator

NODES = [OPERATORS[name] for name in _library.node_operators()]


def attributes_of(operator: Operator, arguments: Sequence[Any]) -> dict[str, Any]:
    """Of the node that stands for a call, but for its format."""
    found: dict[str, Any] = {}
    for argument, given in zip(operator.signature.arguments, arguments, strict=True):
        if argument.is_option:
            found[argument.name] = given if argument.kind == "integer" else float(given)
        elif argument.is_list:
            found[argument.name] = len(given)
    return found
