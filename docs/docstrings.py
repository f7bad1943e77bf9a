"""The docstrings of effattn for mkdocstrings: roles become code, equations MathML, and "a, b: text" two entries."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|attr|data|meth|exc):`~?([^`]+)`")
MATH = re.compile(r"^\.\. math::(.*(?:\n(?:[ \t].*|[ \t]*(?=\n[ \t])))*)", re.MULTILINE)

#: Names in equations that are no products of letters.
NAME = re.compile(r"(?<![\\a-z])([a-z]{2,})(?![a-z])")
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.+(?:\n\1 +.+)*)$", re.MULTILINE)


def in_markdown(text: str) -> str:
    def equations(found: re.Match[str]) -> str:
        parts = [part.strip() for part in re.split(r"\n\s*\n", textwrap.dedent(found[1]).strip())]
        # Aligned by nothing but a relation.
        return "\n\n".join("```math\n" + NAME.sub(r"\\mathrm{\1}", part.replace("&=", "=")) + "\n```" for part in parts)

    def entries(found: re.Match[str]) -> str:
        return "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", "))

    text = SHARED.sub(entries, text)
    text = ROLE.sub(r"`\1`", MATH.sub(equations, text))
    return re.sub(r"(?<!`)``(?!`)", "`", text)


class InMarkdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value)
