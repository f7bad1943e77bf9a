"""A model of timm in onnxruntime and OpenVINO, stock and with effattn's nodes, measured in turn.

    python examples/engines/compare.py efficientvit_b1
    python examples/engines/compare.py efficientvit_b1 --size 1024x2048 --threads 2

Needs timm, onnx, onnxscript, and onnxruntime or openvino.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import effattn
from effattn.testing import import_timm, randomise_batch_norm, randomise_what_starts_at_zero

Call = Callable[[], Any]


def exported(model: torch.nn.Module, image: torch.Tensor) -> dict[str, bytes]:
    """The stock model as torch exports it, and the one with effattn's nodes."""
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["output"]}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of the exporter, about itself
        stock = torch.onnx.export(model, (image,), dynamo=True, verbose=False, **names)
    with_nodes = effattn.export.to_onnx(model, image, **names)
    print(with_nodes)
    return {"stock": stock.model_proto.SerializeToString(), "with effattn": with_nodes.model.SerializeToString()}


def in_onnxruntime(model: bytes, image: torch.Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = effattn.onnxruntime.session(model, options)
    return lambda: session.run(None, {"image": image.numpy()})[0]


def in_openvino(model: bytes, image: torch.Tensor, threads: int) -> Call:
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = effattn.openvino.compile(model, config=config).create_infer_request()
    return lambda: request.infer({"image": image.numpy()}, share_inputs=True, share_outputs=True)[0]


ENGINES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def sample(call: Call) -> float:
    """Milliseconds of a call, after a rest that outlasts idle threads of whoever ran before, and a warm-up."""
    time.sleep(0.06)
    warm_up_ends = time.perf_counter() + 0.05
    while time.perf_counter() < warm_up_ends:
        call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm's name")
    parser.add_argument("--size", default="224", help="of the image, as 224 or 1024x2048")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each, default 15")
    arguments = parser.parse_args()
    height, *width = (int(side) for side in arguments.size.split("x"))

    torch.manual_seed(0)
    model = import_timm().create_model(arguments.model).eval()
    randomise_batch_norm(model)
    randomise_what_starts_at_zero(model)
    image = torch.randn(1, 3, height, *(width or [height]))
    files = exported(model, image)
    installed = [engine for engine in ENGINES if importlib.util.find_spec(engine) is not None]
    calls = {
        (engine, kind): ENGINES[engine](file, image, arguments.threads)
        for engine in installed
        for kind, file in files.items()
    }
    with torch.no_grad():
        right = model(image)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(arguments.rounds):
        for key, call in calls.items():
            times[key].append(sample(call))
    print(f"{arguments.model}, {height} x {(width or [height])[0]}, threads: {arguments.threads}")
    for engine in installed:
        stock, ours = (statistics.median(times[engine, kind]) for kind in files)
        error = (torch.from_numpy(calls[engine, "with effattn"]()) - right).abs().max() / right.abs().max()
        print(
            f"{engine:12} stock {stock:8.2f} ms   with effattn {ours:8.2f} ms   {stock / ours:.2f}x   "
            f"difference {error:.0e} of the largest value"
        )


if __name__ == "__main__":
    main()
