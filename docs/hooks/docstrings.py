"""The docstrings of effattn for mkdocstrings: roles become code, equations MathML, and "a, b: text" two entries."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|attr|data|meth|exc):`~?([^`]+)`")
MATH = re.compile(r"^\.\. math::(.*(?:\n(?:[ \t].*|[ \t]*(?=\n[ \t])))*)", re.MULTILINE)

SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.+(?:\n\1 +.+)*)$", re.MULTILINE)


def in_markdown(text: str) -> str:
    def equations(found: re.Match[str]) -> str:
        parts = [part.strip() for part in re.split(r"\n\s*\n", textwrap.dedent(found[1]).strip())]
        # Aligned by nothing but a relation.
        return "\n\n".join("```math\n" + part.replace("&=", "=") + "\n```" for part in parts)

    def entries(found: re.Match[str]) -> str:
        return "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", "))

    text = SHARED.sub(entries, text)
    return ROLE.sub(r"`\1`", MATH.sub(equations, text)).replace("``", "`")


class InMarkdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value)
