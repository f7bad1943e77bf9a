"""Compiles an accelerated EfficientViT, so that a C++ program can run it without Python.

    python examples/cpp/export.py --output build/cpp

writes ``model.pt2``, the package; ``input.pt``, two images of noise; and ``expected.pt``, what timm's own model, not
accelerated, says about them in eager mode. The weights are random: nothing is downloaded, the classes mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

try:
    import torch
    from torch import nn

    import effattn.export
    from effattn.testing import import_timm, randomise_batch_norm

    timm = import_timm()
except ModuleNotFoundError as error:
    sys.exit(f"The example needs the package {(error.name or str(error)).split('.')[0]}: `make demo` installs it")

MODELS = ("efficientvit_b0", "efficientvit_b1", "efficientvit_m0", "efficientformer_l1", "efficientformerv2_s0")
SMALLEST = 32  # pixels: the models halve an image five times
IMAGES = 2


def make_model(name: str, size: int) -> nn.Module:
    """timm's, in evaluation, with statistics that let something of an image through.

    With the initial ones activations shrink block by block, and the answer is the same for every image.
    """
    model: nn.Module = timm.create_model(name)
    randomise_batch_norm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()
    model(torch.randn(4 * IMAGES, 3, size, size))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="of timm (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/cpp"), help="a folder (default: %(default)s)")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if arguments.size < SMALLEST:
        parser.error(f"--size: expected at least {SMALLEST}, got {arguments.size}")
    if output.exists() and not output.is_dir():
        parser.error(f"--output: expected a folder, got the file {output}")
    output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    with torch.no_grad():
        model = make_model(arguments.model, arguments.size)
        images = torch.randn(IMAGES, 3, arguments.size, arguments.size)
        torch.save(images, output / "input.pt")
        torch.save(model(images), output / "expected.pt")
        frozen = effattn.export.freeze(model)  # accelerated, with weights packed once for all calls
        program = torch.export.export(frozen, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        calls = Counter(str(node.target) for node in program.graph.nodes if "effattn." in str(node.target))
        if not calls:
            sys.exit("The graph calls no operator of effattn: `python -m effattn info` says what is missing")
        print("\n".join(f"the graph calls {name} {count} times" for name, count in calls.items()))
        # Told to check its input, a package would take no less than two images, although it serves one as well.
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(output / "model.pt2"),
            inductor_configs={"aot_inductor.check_lowerbound": False},
        )
    print(f"{package} written")


if __name__ == "__main__":
    main()
