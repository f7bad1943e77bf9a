"""README and site: their code runs, their links lead somewhere, and what they say of sources and results is so."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from effattn import _library
from effattn.testing import import_timm

pytest_examples = pytest.importorskip("pytest_examples", reason="of the docs extra: make docs installs it")

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = list(pytest_examples.find_examples(*map(str, PAGES)))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_code(page, eval_example):
    """The blocks of a page run one after the other and share their names."""
    import_timm()
    eval_example.set_config(line_length=120)
    names = {}
    if page.name == "gpu.md":  # on every backend in tests/device/test_gpu_docs.py
        from effattn.nn import LiteMLA

        model = torch.nn.Sequential(LiteMLA(16, 16, dim=8)).eval()
        names = {"device": torch.device("cpu"), "model": model, "image": torch.randn(2, 16, 6, 7)}
    examples = [example for example in EXAMPLES if example.path == page]
    assert len(examples) == page.read_text().count("```python"), "a block of code that was not found"
    for example in examples:
        reason = example.prefix_settings().get("skip")
        if reason is not None:
            assert len(reason) > 10, "a block that does not run says why"
            continue
        names |= eval_example.run(example, module_globals=names)


# --- links ----------------------------------------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://arxiv.org/"):
            continue
        assert "://" not in link, f"{link}: nothing but papers is far away"
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (page for page in PAGES if page.is_relative_to(ROOT / "docs") and page.parent.name != "design"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, page


def test_nothing_names_a_file_that_is_gone():
    """Files and folders of the repository in prose: whatever has a slash and stands in backquotes."""
    for page in PAGES:
        for name in re.findall(
            r"`((?:effattn|kernels|csrc|benchmarks|tests|examples|docs)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{name_of(page)}: {name}"


# --- facts ----------------------------------------------------------------------------------------------------------


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split() if (ROOT / name).exists()]


def is_checkout() -> bool:
    return (ROOT / ".git").exists()


@pytest.mark.skipif(not is_checkout(), reason="git lists the sources")
def test_environment_variables():
    """The page has those that the sources name in quotes, and those of others that effattn and its build read."""
    page = (ROOT / "docs/environment.md").read_text()
    told = set(re.findall(r"`([A-Z][A-Z_]+_?)`", page))
    read = set()
    for path in tracked("*.py", "*.cpp", "*.h", "*.cu", "Makefile"):
        text = path.read_text()
        if path.name == "Makefile":
            read |= set(re.findall(r"\b(EFFATTN_[A-Z_]+)", text))
        elif path != Path(__file__):
            read |= set(re.findall(r"[\"'](EFFATTN_[A-Z_]+)[\"']", text))
        if path.is_relative_to(ROOT / "effattn") or path.is_relative_to(ROOT / "csrc"):
            read |= set(re.findall(r"environ(?:\.get\(|\[)\s*\"(\w+)\"", text))
    assert read - told == set()
    assert {name for name in told if name.startswith("EFFATTN_")} - read == set()


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", text, flags=re.S)  # tables are the harness's
    assert len(prose.split()) <= 700


def test_the_readme_has_the_figures_of_the_results():
    report = pytest.importorskip("benchmarks.report")
    from benchmarks import results

    table = report.summary_table([results.read(file) for file in tables().results_files()])
    assert table in (ROOT / "README.md").read_text(), "python -m benchmarks readme benchmarks/results/*.json"


def test_one_results_file_a_machine_and_torch_version():
    names = Counter(re.sub(r"-[0-9a-f]{7}$", "", file.stem) for file in tables().results_files())
    assert names and max(names.values()) == 1
    results = ROOT / "benchmarks/results"
    stems = tuple(file.stem for file in tables().results_files())
    assert all(path.name.startswith(stems) for path in results.iterdir()), "made from a file that is gone"


def test_tables():
    """Every table that a page asks for is made, and none is forgotten."""
    known = tables()
    asked = {name for page in PAGES for name in known.MARKER.findall(page.read_text())}
    assert asked == set(known.TABLES)
    for name in asked - {"models", "functions"}:  # minutes of imports, and no table: the build of the site makes them
        rows = known.TABLES[name]().splitlines()
        assert rows[0].startswith("|") and len({row.count("|") for row in rows if row.startswith("|")}) == 1, name


def test_the_support_matrix_has_the_backends_of_this_build():
    """Of CUDA, what is compiled in; with and without, the others are as they are."""
    rows = [row.split(" | ")[1:] for row in tables().TABLES["operators"]().splitlines()[2:]]
    cuda = "yes" if _library.cuda_error is None else "not compiled in"
    assert rows and all(row == ["yes", "yes", cuda, "yes |"] for row in rows)


def test_every_known_class_has_a_row():
    from effattn import integrations, nn

    known = tables()
    assert set(known.OFFICIAL) <= set(integrations._KNOWN)
    assert set(known.FUNCTIONS) >= set(nn.__all__)
