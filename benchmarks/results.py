"""One JSON file per machine, torch version and commit; a later run of a suite replaces that suite's part."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.floor import Rates
from benchmarks.runner import Row
from benchmarks.suites import SUITES, Settings

SCHEMA = 1
Results = dict[str, Any]


def file_name(facts: dict[str, Any], settings: Settings) -> str:
    """Runs that say less than a full one of a commit carry it in their name, and so never replace one."""
    cpu = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*", "", facts["cpu"].lower())).strip("-")
    machine = f"{cpu}-{facts['cores']}c"
    if "gpu" in facts:
        machine = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    torch_version = facts["versions"]["torch"].split("+")[0]
    commit = (facts["commit"] or "unknown")[:7]
    marks = [("dirty", facts["dirty"]), ("short", settings.short), ("partial", bool(settings.only))]
    suffix = "".join(f"-{mark}" for mark, on in marks if on)
    return f"{machine}-torch{torch_version}-{commit}{suffix}.json"


def add(
    results: Results,
    suite: str,
    title: str,
    settings: Settings,
    facts: dict[str, Any],
    rates: Rates,
    rows: list[Row],
    allocator: dict[str, str] | None = None,
) -> None:
    """Puts a suite's part in place; ``allocator`` names its settings where they are not this process's."""
    results["suites"][suite] = {
        "title": title,
        "settings": {"rounds": settings.rounds, "short": settings.short, "only": list(settings.only)},
        "environment": facts if allocator is None else {**facts, "allocator": allocator},
        "rates": rates.as_json(),
        "rows": [asdict(row) for row in rows],
    }


def read(path: Path) -> Results:
    """Raises ValueError if the file is not one of ours."""
    results: Results = json.loads(path.read_text())
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a results file of schema {SCHEMA}, got schema {results.get('schema')!r}")
    return results


def read_or_new(path: Path) -> Results:
    return read(path) if path.exists() else {"schema": SCHEMA, "suites": {}}


def write(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    first: Iterable[str] = [name for name in SUITES if name in results["suites"]]
    results["suites"] = {name: results["suites"][name] for name in dict.fromkeys([*first, *results["suites"]])}
    path.write_text(json.dumps(results, indent=1) + "\n")


def rows(results: Results, suite: str) -> list[Row]:
    return [Row(**row) for row in results["suites"].get(suite, {}).get("rows", ())]
