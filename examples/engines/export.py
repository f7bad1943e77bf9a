"""Exports an EfficientViT to ONNX with effattn's nodes, so that a C++ program of onnxruntime or OpenVINO can run it.

    python examples/engines/export.py --output build/engines

writes ``model.onnx``, for any number of images; ``input.bin``, two images of noise; and ``expected.bin``, what timm's
own model says about them in eager PyTorch. The last two are float32 and nothing else. The weights are random: nothing
is downloaded, the classes mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import onnx  # noqa: F401  (said here, before the model is made)
    import onnxscript  # noqa: F401
    import torch
    from torch import nn

    from effattn.export import to_onnx
    from effattn.testing import import_timm, randomise_batch_norm

    timm = import_timm()
except ModuleNotFoundError as error:
    name = (error.name or str(error)).split(".")[0]
    sys.exit(f"The example needs the package {name}: `make engines-example` installs it")

MODELS = ("efficientvit_b0", "efficientvit_b1", "efficientvit_b2", "efficientvit_m0", "efficientvit_m4")
SMALLEST = 32  # pixels: the models halve an image five times
# Of Microsoft's. With random weights, and windows that are part padding, float32 itself is off by 1e-3 there.
ONLY_SIZE = {"efficientvit_m0": 224, "efficientvit_m4": 224}
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
    parser.add_argument("--model", choices=MODELS, default="efficientvit_b1", help="of timm (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/engines"), help="a folder (default: %(default)s)")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if arguments.size < SMALLEST:
        parser.error(f"--size: expected at least {SMALLEST}, got {arguments.size}")
    if arguments.size != (only := ONLY_SIZE.get(arguments.model, arguments.size)):
        parser.error(f"--size: expected {only} for {arguments.model}, got {arguments.size}")
    if output.exists() and not output.is_dir():
        parser.error(f"--output: expected a folder, got the file {output}")
    output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    with torch.no_grad():
        model = make_model(arguments.model, arguments.size)
        images = torch.randn(IMAGES, 3, arguments.size, arguments.size)
        images.numpy().tofile(output / "input.bin")
        model(images).numpy().tofile(output / "expected.bin")
    exported = to_onnx(model, images, output / "model.onnx", dynamic=[{0: "batch"}])
    if not exported.nodes:
        sys.exit("The graph has no node of effattn: `python -m effattn info` says what is missing")
    print(exported)


if __name__ == "__main__":
    main()
