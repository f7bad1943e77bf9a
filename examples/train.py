"""Trains a small EfficientViT on scikit-learn's digits: stock and accelerated, float32 and bfloat16 autocast.

    python examples/train.py --output train.png

Each run starts from the same weights and sees the same batches in a process of its own, whose peak memory it
reports. The curves lie on each other until rounding parts them, and end at the same accuracy. Last comes the case for
float32 sums: an attention in float16 with activations around ten thousand.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    import torch
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from sklearn.datasets import load_digits
    from torch.nn import functional

    import effattn
    from effattn.testing import import_timm, official_multi_scale_attention
except ModuleNotFoundError as error:
    sys.exit(f"The example needs the package {(error.name or str(error)).split('.')[0]}: `make demo` installs it")

IMAGE = 128  # digits of 8x8 pixels, enlarged, so that there are tokens to attend to: 8x8 and 4x4
BATCH = 32
COLOURS = {"stock": "#656d76", "accelerated": "#b5367a"}


@dataclass(frozen=True)
class Settings:
    accelerated: bool
    autocast: bool
    epochs: int
    steps: int | None  # in an epoch, for a trial

    @property
    def name(self) -> str:
        return "accelerated" if self.accelerated else "stock"

    @property
    def dtype(self) -> str:
        return "bfloat16 autocast" if self.autocast else "float32"


@dataclass(frozen=True)
class Run:
    settings: Settings
    losses: list[float]
    accuracy: float
    seconds_a_step: float
    peak_bytes: int


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """(1797, 1, 8, 8) in 0 to 1, and their labels; in an order that mixes writers."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images).float().div(16).unsqueeze(1)[order], torch.tensor(data.target)[order]


def images(pixels: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(pixels, size=IMAGE, mode="bilinear").expand(-1, 3, -1, -1)


def small_efficientvit() -> torch.nn.Module:
    import_timm()
    from timm.models.efficientvit_mit import EfficientVit

    torch.manual_seed(0)
    return EfficientVit(
        widths=(8, 16, 32, 64, 128), depths=(1, 1, 1, 2, 2), head_dim=16, num_classes=10, head_widths=(256, 256)
    )


def train(settings: Settings) -> Run:
    """One run; called in a fresh process."""
    pixels, labels = digits()
    held_out = len(labels) // 5
    model = small_efficientvit()
    if settings.accelerated:
        effattn.accelerate(model)
    optimiser = torch.optim.AdamW(model.parameters())
    steps = settings.epochs * min(math.ceil((len(labels) - held_out) / BATCH), settings.steps or len(labels))
    # Warm-up and decay, or rounding differences would grow into different models.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=steps)
    losses, seconds = [], []
    for epoch in range(settings.epochs):
        order = torch.randperm(len(labels) - held_out, generator=torch.Generator().manual_seed(epoch))
        for indices in order.split(BATCH)[: settings.steps]:
            x, y = images(pixels[held_out:][indices]), labels[held_out:][indices]
            start = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast):
                loss = functional.cross_entropy(model(x).float(), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast):
        answers = torch.cat([model(images(part)).argmax(1) for part in pixels[:held_out].split(BATCH)])
    accuracy = (answers == labels[:held_out]).float().mean().item()
    return Run(settings, losses, accuracy, sorted(seconds)[len(seconds) // 2], peak)


def table_of(runs: list[Run]) -> Table:
    table = Table(title="Training on digits", title_justify="left")
    for column in ("", "model", "last loss", "accuracy", "ms a step", "peak memory, MB"):
        table.add_column(column, justify="left" if column in ("", "model") else "right")
    for run in runs:
        last = sum(run.losses[-5:]) / len(run.losses[-5:])
        table.add_row(
            run.settings.dtype,
            run.settings.name,
            f"{last:.4f}",
            f"{run.accuracy:.1%}",
            f"{1e3 * run.seconds_a_step:.0f}",
            f"{run.peak_bytes / 1e6:.0f}",
            end_section=run.settings.accelerated,
        )
    return table


def draw(path: Path, runs: list[Run]) -> None:
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), ("float32", "bfloat16 autocast"), strict=True):
        for run in runs:
            if run.settings.dtype == dtype:
                label = f"{run.settings.name}, {1e3 * run.seconds_a_step:.0f} ms a step, {run.peak_bytes / 1e6:.0f} MB"
                style = {"linewidth": 1.2} if run.settings.accelerated else {"linewidth": 3.5, "alpha": 0.6}
                axes.plot(run.losses, label=label, color=COLOURS[run.settings.name], **style)
        axes.set(title=dtype, xlabel="step", yscale="log")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("cross entropy")
    figure.savefig(path)


def float16_case(console: Console) -> bool:
    """Whether ours stays finite where the formulation without float32 sums does not."""
    heads, head_dim, generator = 8, 16, torch.Generator().manual_seed(0)
    channels = 3 * heads * head_dim
    qkv = (1e4 * torch.randn(1, channels, 64, 128, generator=generator)).clamp(-65504, 65504).half()
    depthwise = [torch.randn(channels, 1, 5, 5, generator=generator) / 5]
    pointwise = [torch.randn(channels, head_dim, 1, 1, generator=generator) / head_dim**0.5]
    ours = partial(effattn.multi_scale_linear_attention, dw_weights=depthwise, pw_weights=pointwise, head_dim=head_dim)
    with torch.no_grad():
        outs = {
            "official formulation in float16": official_multi_scale_attention(
                qkv, depthwise, pointwise, head_dim, upcast=False
            ),
            "effattn in float16": ours(qkv),
        }
        truth = ours(qkv.float())
    largest = qkv.abs().max().item()
    console.print(f"\nMulti-scale attention in float16, activations up to {largest:.0f}, 64x128 tokens:")
    for name, out in outs.items():
        off = (out.float() - truth).norm() / truth.norm()
        console.print(f"  {name}: {out.isfinite().float().mean():.1%} of the outputs finite, relative error {off:.1e}")
    return bool(outs["effattn in float16"].isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("train.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="times through the digits (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="at most so many steps an epoch, for a trial")
    arguments = parser.parse_args()
    if not arguments.output.parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")
    console = Console(highlight=False)

    plans = [
        Settings(accelerated, autocast, arguments.epochs, arguments.steps)
        for autocast in (False, True)
        for accelerated in (False, True)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        runs = [pool.submit(train, plan).result() for plan in track(plans, "training", console=console)]
    console.print(table_of(runs))
    draw(arguments.output, runs)
    console.print(f"{arguments.output} written", markup=False)
    if not float16_case(console):
        sys.exit("effattn gave a value in float16 that is not finite")


if __name__ == "__main__":
    main()
