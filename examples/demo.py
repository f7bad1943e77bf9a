"""effattn on a photograph: timm's models, stock against accelerated, as tables and as a picture.

    make demo
    python examples/demo.py --output demo.png

The weights are random (nothing is downloaded), so the classes mean nothing. What counts is that both
models give the same answers, and how long they take.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

# With glibc's default every activation above 32 MB is mapped and unmapped anew, and page faults would
# decide the times of both models. The variables count only from the start of a process: start once more.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
if __name__ == "__main__" and sys.platform == "linux" and not ALLOCATOR.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})

STARTED = time.perf_counter()

try:
    import numpy as np
    import torch
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image, ImageOps
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_sample_image

    import effattn
    from effattn.ops import OPERATORS
    from effattn.registry import choose
    from effattn.testing import import_timm, randomise_batch_norm, randomise_what_starts_at_zero

    timm = import_timm()
except ModuleNotFoundError as error:
    sys.exit(f"The demo needs the package {(error.name or str(error)).split('.')[0]}: `make demo` installs it")

MODEL = "efficientvit_b1"
OTHERS = ("efficientvit_m4", "efficientformer_l1", "efficientformerv2_s1")  # at the smallest size, as a table alone
ROUNDS = {(224, 224): 15, (1024, 2048): 5}  # (height, width) -> timed rounds
QUICK_ROUNDS = {(224, 224): 1, (256, 512): 1}  # whether it works at all
SECONDS = 25  # no further round of a size after these: a slow machine gets fewer of them
# The stock model stands here twice: how far it is from itself says how far the other ratio can be trusted.
CANDIDATES: dict[str, Callable[[torch.nn.Module], object]] = {
    "stock": effattn.restore,
    "accelerated": effattn.accelerate,
    "stock again": effattn.restore,
}
WHOLE, MODULES = PARTS = ("whole model", "attention")
# Rounding differs between any two ways to sum in float32; more than this would be a bug.
LARGEST_DIFFERENCE = 1e-5

Size = tuple[int, int]
Times = dict[str, dict[str, float]]  # candidate -> part -> milliseconds


# --- the model and the photograph -----------------------------------------------------------------------


def load_photograph(size: Size) -> Image.Image:
    """scikit-learn's photograph of the Summer Palace, cropped and resized to (height, width)."""
    height, width = size
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    return ImageOps.fit(photograph, (width, height), Image.Resampling.BICUBIC, centering=(0.5, 0.3))


def preprocess(photograph: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(1, 3, H, W), as models trained on ImageNet expect it."""
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1).unsqueeze(0).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def settle_batch_norm(model: torch.nn.Module, image: torch.Tensor) -> None:
    """Takes the statistics of the BatchNorms from one image, as training would.

    Left random, timm's initial weights shrink the activations block by block until only biases are left
    of the photograph. The projections behind the attention keep random statistics: freshly initialised
    attention varies little over an image, and dividing by that would amplify it a thousandfold.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0 if ".proj." in name else 1.0
    model.train()
    with torch.no_grad():
        model(image)
    model.eval()


def make_model(name: str, image: torch.Tensor) -> torch.nn.Module:
    """timm's, in evaluation, with weights that let something of an image through."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    randomise_what_starts_at_zero(model)
    randomise_batch_norm(model)
    settle_batch_norm(model, image)
    return model


def replaced_modules(model: torch.nn.Module) -> tuple[effattn.Report, list[torch.nn.Module]]:
    """What accelerate() replaces, and the outermost of these modules."""
    report = effattn.accelerate(model)
    effattn.restore(model)
    names = [entry.module for entry in report.replaced]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return report, [model.get_submodule(name) for name in outermost]


# --- measuring ------------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the time that one call of the model spends in its attention modules.

    Hooks stay with a module when effattn.accelerate() exchanges its class.
    """

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        for module in modules:
            module.register_forward_pre_hook(self._add(MODULES, -1))
            module.register_forward_hook(self._add(MODULES, +1))

    def _add(self, part: str, sign: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.seconds[part] += sign * time.perf_counter()

        return hook

    def time(self, model: torch.nn.Module, image: torch.Tensor) -> dict[str, float]:
        """Milliseconds by part of one call."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        start = time.perf_counter()
        model(image)
        self.seconds[WHOLE] = time.perf_counter() - start
        return {part: 1e3 * seconds for part, seconds in self.seconds.items()}


def measure(model: torch.nn.Module, stopwatch: Stopwatch, image: torch.Tensor, rounds: int) -> Times:
    """Medians over interleaved rounds, so that a slow moment of the machine meets every candidate alike."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    end = time.perf_counter() + SECONDS
    while len(runs["stock again"]) < rounds and (time.perf_counter() < end or not runs["stock again"]):
        for name, switch in CANDIDATES.items():
            switch(model)
            time.sleep(0.02)
            model(image)  # untimed: pools and caches settle on the candidate
            runs[name].append(stopwatch.time(model, image))
    effattn.restore(model)
    return {name: {part: median(run[part] for run in runs[name]) for part in PARTS} for name in CANDIDATES}


class Answers:
    """What the stock model, the accelerated one and, for a small image, the stock one in float64 say."""

    def __init__(self, model: torch.nn.Module, module: torch.nn.Module, image: torch.Tensor) -> None:
        outputs: list[torch.Tensor] = []
        hook = module.register_forward_hook(lambda _module, _args, out: outputs.append(out))
        self.stock = model(image)
        effattn.accelerate(model)
        self.accelerated = model(image)
        effattn.restore(model)
        hook.remove()
        #: What comes out of ``module``, (C, H, W), stock and accelerated.
        self.attention = tuple(out[0] for out in outputs)
        # Convolutions in float64 are slow: half a minute for the large image.
        self.float64 = copy.deepcopy(model).double()(image.double()) if image.numel() < 1_000_000 else None

    def same_top5(self) -> bool:
        return torch.equal(self.stock.topk(5).indices, self.accelerated.topk(5).indices)


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((left - right).abs().max() / right.abs().max()).item()


# --- showing --------------------------------------------------------------------------------------------


def name_of(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def short(report: effattn.Report) -> str:
    """The first line of the report, and one line for all modules of a kind."""
    lines = str(report).splitlines()[:1]
    kinds = Counter((entry.original, entry.detail) for entry in report.replaced)
    return "\n".join(lines + [f"  {count} x {old}\n    -> {new}" for (old, new), count in kinds.items()])


def answers_table(answers: dict[Size, Answers]) -> Table:
    table = Table(title="The answers, largest difference over largest value", title_justify="left")
    for column in ("image", "accelerated\nfrom stock", "stock\nfrom float64", "accelerated\nfrom float64", "top 5"):
        table.add_column(column, justify="left" if column == "image" else "right")
    for size, answer in answers.items():
        differences = [difference(answer.accelerated, answer.stock)]
        if answer.float64 is not None:
            differences += [difference(out, answer.float64) for out in (answer.stock, answer.accelerated)]
        cells = [f"{value:.1e}" for value in differences] + ["-"] * (3 - len(differences))
        table.add_row(name_of(size), *cells, "equal" if answer.same_top5() else "[red]differ")
    return table


def times_table(first: str, times: dict[str, Times]) -> Table:
    """``first``: what the keys are."""
    table = Table(title="The times of one image, ms", title_justify="left")
    for column in (first, "part", "stock", "accelerated", "faster", "stock\nagain"):
        table.add_column(column, justify="left" if column in (first, "part") else "right")
    for what, by_candidate in times.items():
        stock, accelerated, again = by_candidate.values()
        for part in PARTS:
            table.add_row(
                what if part == WHOLE else "",
                part,
                f"{stock[part]:.2f}",
                f"{accelerated[part]:.2f}",
                f"[bold]{stock[part] / accelerated[part]:.2f}x",
                f"{stock[part] / again[part]:.2f}x",
                end_section=part == PARTS[-1],
            )
    return table


INK, FAINT, STOCK, ACCELERATED, COLOURMAP = "#1f2328", "#656d76", "#a9b1ba", "#b5367a", colormaps["magma"].resampled(64)
WIDTH, HEIGHT, MARGIN, LEFT, RIGHT = 1600, 1124, 24, 24, 812  # of the picture, in pixels
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 15, "color": INK, "pad": 9}
LABEL: dict[str, Any] = {"fontsize": 13, "color": INK}


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels from the upper left corner."""
    return figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))


def draw_image(figure: Figure, place: tuple[int, int], title: str, image: Any, **options: Any) -> None:
    """An image of 2:1, with its title and, for a map, a colour bar above."""
    (left, top), width = place, RIGHT - LEFT - MARGIN
    axes = add_axes(figure, left, top, width, width / 2)
    drawn = axes.imshow(image, extent=(0, 2, 0, 1), **options)
    axes.axis("off")
    axes.set_title(title, **TITLE)
    if "cmap" in options:
        scale = add_axes(figure, left + width - 178, top - 25, 140, 14)
        figure.colorbar(drawn, cax=scale, orientation="horizontal", ticks=[]).outline.set_visible(False)
        for x, align, value in ((-0.06, "right", drawn.norm.vmin), (1.06, "left", drawn.norm.vmax)):
            scale.text(x, 0.42, f"{value:.1f}", ha=align, va="center", transform=scale.transAxes, **LABEL)


def draw_times(figure: Figure, place: tuple[int, int], title: str, times: Times) -> None:
    """Two bars for each part of the model, all on one scale."""
    labels = 164  # pixels
    axes = add_axes(figure, place[0] + labels, place[1], RIGHT - LEFT - MARGIN - labels, 158)
    stock, accelerated = times["stock"], times["accelerated"]
    longest = max(*stock.values(), *accelerated.values())
    for row, part in enumerate(PARTS):
        faster = f"    {stock[part] / accelerated[part]:.2f}x"
        for name, y, colour, value, note in (
            ("stock", row - 0.2, STOCK, stock[part], ""),
            ("accelerated", row + 0.2, ACCELERATED, accelerated[part], faster),
        ):
            axes.barh(y, value, height=0.38, color=colour, label=name if row == 0 else None)
            number = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
            axes.text(value + 0.01 * longest, y, f"{number} ms{note}", va="center", **LABEL)
        axes.text(-0.015, row, part, ha="right", va="center", transform=axes.get_yaxis_transform(), **LABEL)
    axes.set(xlim=(0, 1.3 * longest))
    axes.invert_yaxis()
    axes.axis("off")
    axes.legend(loc="lower right", fontsize=LABEL["fontsize"], labelcolor=INK, frameon=False)
    figure.text(place[0] / WIDTH, 1 - (place[1] - 11) / HEIGHT, title, fontsize=TITLE["fontsize"], color=INK)


def draw(path: Path, photograph: Image.Image, answers: Answers, times: dict[Size, Times]) -> None:
    """The photograph, what the attention makes of it, stock and accelerated, and the times."""
    stock, accelerated = answers.attention
    mean, std = stock.mean((1, 2), keepdim=True), stock.std((1, 2), keepdim=True)
    energy = [((out - mean) / std).square().mean(0).sqrt() for out in (stock, accelerated)]
    apart = (accelerated - stock).abs().amax(0) / stock.abs().max()
    low, high = energy[0].quantile(torch.tensor([0.01, 0.99])).tolist()
    maps = {"cmap": COLOURMAP, "vmin": low, "vmax": high, "interpolation": "bicubic"}

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
    draw_image(figure, (LEFT, 44), f"Photograph, {photograph.height}x{photograph.width}", photograph)
    draw_image(figure, (RIGHT, 44), "Attention output, stock", energy[0], **maps)
    draw_image(figure, (LEFT, 476), "Attention output, accelerated", energy[1], **maps)
    maps |= {"vmin": 0, "vmax": None, "interpolation": "nearest"}
    draw_image(figure, (RIGHT, 476), "Difference, in $10^{-7}$ of the largest output", 1e7 * apart, **maps)
    for left, (size, of_size) in zip((LEFT, RIGHT), times.items(), strict=True):
        draw_times(figure, (left, 912), f"Time of one image, {name_of(size)}", of_size)
    caption = (
        f"{MODEL}, random weights, float32, eager, {torch.get_num_threads()} CPU threads. Attention output: "
        f"of the second LiteMLA, {stock.shape[0]} channels, {name_of(stock.shape[1:])} tokens; RMS over the channels, "
        "each in units of its standard deviation."
    )
    figure.text(LEFT / WIDTH, 16 / HEIGHT, caption, fontsize=11, color=FAINT)
    # No alpha and a colour map of 64 steps: two thirds of the bytes, and nothing to see of it.
    with BytesIO() as buffer:
        figure.savefig(buffer, format="png")
        Image.open(buffer).convert("RGB").save(path, format="png", optimize=True)


def measure_others(image: torch.Tensor, rounds: int) -> dict[str, tuple[str, Times]]:
    """By model: what was replaced and how far the answers are apart, and the times."""
    found = {}
    for name in OTHERS:
        model = make_model(name, image.expand(2, -1, -1, -1))
        report, modules = replaced_modules(model)
        with torch.inference_mode():
            stock = model(image)
            effattn.accelerate(model)
            apart = difference(model(image), stock)
            effattn.restore(model)
            if apart > LARGEST_DIFFERENCE:
                sys.exit(f"{name}: the answers differ by more than rounding ({apart:.1e}): no times are taken.")
            times = measure(model, Stopwatch(modules), image, rounds)
        found[name] = f"{len(report.replaced)}, {apart:.1e}", times
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small images, one round: does everything work?")
    arguments = parser.parse_args()
    output: Path = arguments.output
    all_rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    large = max(all_rounds)
    if not output.parent.is_dir():
        parser.error(f"--output: there is no folder {output.parent}")
    console = Console(highlight=False)

    normalisation = timm.data.resolve_model_data_config(timm.create_model(MODEL))
    photographs = {size: load_photograph(size) for size in all_rounds}
    images = {size: preprocess(p, normalisation["mean"], normalisation["std"]) for size, p in photographs.items()}
    model = make_model(MODEL, torch.nn.functional.avg_pool2d(images[large], 2))

    backend = choose(next(iter(OPERATORS)), torch.device("cpu"), torch.float32).name
    cpu = f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}"
    console.print(f"{MODEL}, random weights, float32, eager\ntorch {torch.__version__}, {cpu}; backend: {backend}")
    if backend == "reference":
        console.print("[yellow]The plain PyTorch reference serves, not the compiled kernels:")
        for status in effattn.backends():
            console.print(f"  {status.name}: {status.reason or 'available'}", markup=False)
    if ALLOCATOR.items() <= os.environ.items():
        console.print("MALLOC_* set, so that glibc keeps its heap: no page faults in the times")

    report, modules = replaced_modules(model)
    console.print(short(report), markup=False)

    with torch.inference_mode():
        answers = {size: Answers(model, modules[1], image) for size, image in images.items()}
        console.print(answers_table(answers))
        if not all(difference(answer.accelerated, answer.stock) <= LARGEST_DIFFERENCE for answer in answers.values()):
            sys.exit("The answers differ by more than rounding: no times are taken.")
        stopwatch = Stopwatch(modules)
        times = {size: measure(model, stopwatch, images[size], rounds) for size, rounds in all_rounds.items()}
    console.print(times_table("image", {name_of(size): by_size for size, by_size in times.items()}))
    others = measure_others(images[min(images)], all_rounds[min(all_rounds)])
    console.print(f"Other models, {name_of(min(images))}; modules that effattn replaced, and the largest difference:")
    console.print("\n".join(f"  {name}: {note}" for name, (note, _) in others.items()), markup=False)
    console.print(times_table("model", {name: of_model for name, (_, of_model) in others.items()}))
    all_times = [*times.values(), *(of_model for _, of_model in others.values())]
    off = max(abs(math.log(t["stock"][part] / t["stock again"][part])) for t in all_times for part in PARTS)
    if off > 0.1:
        console.print(
            f"[yellow]Stock is up to {math.expm1(off):.0%} off itself (a busy machine?): trust no ratio beyond that."
        )
    draw(output, photographs[large], answers[large], times)
    console.print(f"{output} written; {time.perf_counter() - STARTED:.0f} s in all", markup=False)


if __name__ == "__main__":
    main()
