"""What the site says of backends, models and figures, read from the package and from benchmarks/results.

A hook of mkdocs: it replaces ``<!-- table: NAME -->`` in a page by the table of that name, makes MathML of blocks of
math, and puts pages about operators into the navigation. ``python docs/tables.py NAME`` prints a table.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(ROOT),) if folder not in sys.path]

import torch  # noqa: E402

import effattn  # noqa: E402
from effattn import integrations, registry  # noqa: E402
from effattn.backends import ORDER, Backend  # noqa: E402
from effattn.backends._base import NamedSizes  # noqa: E402
from effattn.ops import INFERENCE_OPERATORS, OPERATORS  # noqa: E402
from effattn.ops._operator import InferenceOperator, Operator  # noqa: E402
from effattn.testing import import_timm  # noqa: E402

# --- operators and backends -----------------------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Whose tensors a backend takes, as the registry is asked about them.
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda", "reference": "cpu"}
TITLES = {"cpu": "CPU", "cuda": "CUDA", "triton": "Triton", "reference": "plain PyTorch"}
#: Larger than any limit.
HUGE = 10**12


def operators() -> list[Operator | InferenceOperator]:
    """All operators, those for inference alone last."""
    return [*OPERATORS.values(), *INFERENCE_OPERATORS.values()]


def is_public(op: Operator | InferenceOperator) -> bool:
    return hasattr(effattn, op.name)


def reasons(
    backend: Backend, op: Operator | InferenceOperator, dtype: torch.dtype, sizes: NamedSizes = ()
) -> list[str]:
    return backend.reasons(op.name, torch.device(DEVICES[backend.name]), dtype, sizes)


def is_compiled_in(backend: Backend) -> bool:
    """Where the page is made; no word about what the backend could do."""
    return any(not has_no(backend, op) for op in OPERATORS.values())


def has_no(backend: Backend, op: Operator | InferenceOperator) -> bool:
    return f"has no {op.name}" in reasons(backend, op, torch.float32)


def directions(backend: Backend, op: Operator | InferenceOperator) -> str:
    """What of an operator a backend has: "yes" for forward and backward, "forward", or "no"."""
    if not is_compiled_in(backend):
        return "not compiled in"
    if has_no(backend, op):
        return "no"
    return "yes" if isinstance(op, Operator) or backend.namespace is None else "forward"


def dtypes(backend: Backend, op: Operator | InferenceOperator) -> list[str]:
    base = set(reasons(backend, op, torch.float32))
    return [_name(dtype) for dtype in DTYPES if set(reasons(backend, op, dtype)) <= base]


def limits(backend: Backend, op: Operator) -> list[str]:
    """As the backend words them when it refuses a call: "heads of up to 128 channels"."""
    base = reasons(backend, op, torch.float32)
    huge = [(name, HUGE) for name in dict.fromkeys(op.limits)]
    refused = [r for r in reasons(backend, op, torch.float32, huge) if r not in base]
    return [r.removeprefix("takes ").removesuffix(f", not {HUGE}") for r in refused]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operator_table(public: bool) -> str:
    chosen = [op for op in operators() if is_public(op) is public]
    body = [[f"`{op.name}`", *(directions(backend, op) for backend in ORDER)] for op in chosen]
    return table(["operator", *(TITLES[backend.name] for backend in ORDER)], body)


def limit_table() -> str:
    body = []
    for op in OPERATORS.values():
        if not is_public(op):
            continue
        cells = [
            "; ".join(limits(backend, op)) or "none" if is_compiled_in(backend) else "not compiled in"
            for backend in ORDER
        ]
        body.append([f"`{op.name}`", *cells])
    return table(["operator", *(TITLES[backend.name] for backend in ORDER)], body)


def backend_table() -> str:
    any_op = next(filter(is_public, operators()))
    body = []
    for backend in ORDER:
        takes = "every device" if backend.name == "reference" else f"{DEVICES[backend.name].upper()} tensors"
        body.append([TITLES[backend.name], f"`{backend.name}`", takes, ", ".join(dtypes(backend, any_op))])
    return (
        table(["", "name", "takes", "dtypes"], body)
        + f"\n\nThe order of the table is that of `effattn.backends()`; {registry.explain_order()}."
    )


def isa_table() -> str:
    library = effattn._library._C
    assert library is not None, effattn._library.error
    sys.path.insert(0, str(ROOT / "csrc"))
    import build

    body = [
        [f"`{name}`", architecture, str(lanes), " ".join(flag for flag in flags if flag.startswith("-m")) or "none"]
        for architecture, rows in build.ISAS.items()
        for name, lanes, flags in rows
        if not any(row["name"] == name and row["test_only"] for row in library.isas())
    ]
    return table(["name", "architecture", "floats a vector", "flags of the compiler"], body)


# --- models ---------------------------------------------------------------------------------------------------------

#: Where the originals of those classes are, of which the library is no package.
OFFICIAL = {
    "LiteMLA": ("mit-han-lab/efficientvit", "EfficientViT (MIT), SAM, DC-AE"),
    "CascadedGroupAttention": ("microsoft/Cream", "EfficientViT (Microsoft)"),
    "LocalWindowAttention": ("microsoft/Cream", "EfficientViT (Microsoft)"),
    "Attention": ("snap-research/EfficientFormer", "EfficientFormer"),
    "Attention4D": ("snap-research/EfficientFormer", "EfficientFormerV2"),
    "Attention4DDownsample": ("snap-research/EfficientFormer", "EfficientFormerV2"),
}
#: What to call in model code of one's own.
FUNCTIONS = {
    "LiteMLA": "multi_scale_linear_attention",
    "SanaMultiscaleLinearAttention": "multi_scale_linear_attention",
    "SanaLinearAttnProcessor": "relu_linear_attention",
    "CascadedGroupAttention": "cascaded_group_attention",
    "LocalWindowAttention": "cascaded_group_attention",
    "EfficientFormerAttention": "biased_attention",
    "EfficientFormerV2Attention": "biased_attention",
    "EfficientFormerV2AttentionDownsample": "biased_attention",
}
TIMM = ("efficientvit*", "efficientformer*")


def _diffusers() -> dict[str, Callable[[], torch.nn.Module]]:
    import diffusers

    def dc_ae() -> torch.nn.Module:
        blocks = {f"{half}_block_types": ("ResBlock", "EfficientViTBlock") for half in ("encoder", "decoder")}
        sizes = {f"{half}_block_out_channels": (32, 64) for half in ("encoder", "decoder")}
        layers = {f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")}
        scales = {f"{half}_qkv_multiscales": ((), (5,)) for half in ("encoder", "decoder")}
        return diffusers.AutoencoderDC(latent_channels=4, **blocks, **sizes, **layers, **scales)

    return {
        "`AutoencoderDC` (DC-AE)": dc_ae,
        "`SanaTransformer2DModel` (Sana)": lambda: diffusers.SanaTransformer2DModel(num_layers=1),
    }


def replaced(make: Callable[[], torch.nn.Module]) -> tuple[tuple[str, str], ...]:
    """The class names that accelerate() exchanges in a model, of tensors without memory."""
    with torch.device("meta"):
        model = make()
    report = effattn.accelerate(model)
    assert report.replaced and not report.left_alone, report
    return tuple(dict.fromkeys((e.original.rpartition(".")[2], e.detail.rpartition(".")[2]) for e in report.replaced))


@cache
def model_table() -> str:
    """What accelerate() replaces in every model that timm and diffusers have, tried; and the official ones by name."""
    timm = import_timm()
    body, seen = [], set()
    families: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for name in (name for pattern in TIMM for name in timm.list_models(pattern)):
        families[replaced(lambda name=name: timm.create_model(name))].append(name)
    found = [("timm", _code(names), classes) for classes, names in families.items()]
    found += [("diffusers", name, replaced(make)) for name, make in _diffusers().items()]
    for library, models, classes in found:
        seen.update(original for original, _ in classes)
        body.append([library, models, *_calls(classes)])
    known = integrations._KNOWN
    assert set(known) <= seen | set(OFFICIAL), f"no model for {set(known) - seen - set(OFFICIAL)}"
    official: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for original, source in OFFICIAL.items():
        official[source].append((original, known[original].replacement.__name__))
    body += [[repository, models, *_calls(classes)] for (repository, models), classes in official.items()]
    return table(["from", "models", "function", "`accelerate` replaces", "by"], body)


def _calls(classes: Iterable[tuple[str, str]]) -> list[str]:
    originals, replacements = (list(dict.fromkeys(names)) for names in zip(*classes, strict=True))
    modules = [f"`nn.{name}`" if hasattr(effattn.nn, name) else f"`{name}`" for name in replacements]
    functions = dict.fromkeys(f"`{FUNCTIONS[name]}`" for name in replacements)
    return [", ".join(functions), _code(originals), ", ".join(modules)]


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# --- benchmarks -----------------------------------------------------------------------------------------------------


def results_files() -> list[Path]:
    return sorted((ROOT / "benchmarks/results").glob("*.json"))


def benchmark_table() -> str:
    from benchmarks import report, results

    return report.readme_table([results.read(file) for file in results_files()])


def engine_table(suite: str) -> str:
    from benchmarks import report, results

    return report.engine_table([results.read(file) for file in results_files()], suite)


# --- mkdocs ---------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "functions": lambda: "\n\n".join(f"::: effattn.{name}" for name in effattn.functional.__all__),
    "operators": lambda: operator_table(public=True),
    "modules": lambda: operator_table(public=False),
    "limits": limit_table,
    "backends": backend_table,
    "instruction sets": isa_table,
    "models": model_table,
    "benchmarks": benchmark_table,
    "engines": lambda: engine_table("engines"),
    "engines in bfloat16": lambda: engine_table("engine-narrow"),
    "engine sessions": lambda: engine_table("engine-sessions"),
    "engine nodes": lambda: engine_table("engine-nodes"),
}
MARKER = re.compile(r"^<!-- table: (.+) -->$", re.MULTILINE)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def on_config(config: Any) -> None:
    """The design of each operator has a page, which mkdocs.yml need not name."""
    (section,) = (entry["Design"] for entry in config.nav if "Design" in entry)
    named = {page for entry in section for page in entry.values()}
    pages = (path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs/design").glob("*.md")))
    section += [page for page in pages if page not in named]


def on_page_markdown(markdown: str, **_: Any) -> str:
    return MARKER.sub(lambda found: TABLES[found[1]](), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """A page asks no server but its own for anything: what is far away are links to papers."""
    far = [url for url in re.findall(r"<(?:link|script|img|iframe)[^>]*?(?:src|href)=\"?(https?:[^\" >]+)", output)]
    if far:
        raise RuntimeError(f"{page.file.src_uri}: asks {', '.join(far)}")
    return output


def mathml(source: str, *_: Any, **__: Any) -> str:
    """For blocks that are marked as math: what browsers show without a script and without fonts of others."""
    from latex2mathml.converter import convert

    return convert(source, display="block")


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in TABLES]:
        sys.exit(f"usage: python docs/tables.py {' | '.join(TABLES)}")
    print(TABLES[sys.argv[1]]())
