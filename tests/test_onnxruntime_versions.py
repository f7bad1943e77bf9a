"""Releases of onnxruntime other than the installed one: the oldest with the interface that is used, and one between."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from engines import node_model
from nodes import NODES
from specified import first_of
from tiers import full

import effattn
from effattn.testing import make_arguments

#: numpy before 2 is what the oldest was built with.
VERSIONS = [("1.17.0", "numpy<2"), full("1.20.1", "numpy<3")]

PROGRAM = """
import sys, numpy as np, onnxruntime
library, folder, *names = sys.argv[1:]
for name in names:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", options, providers=["CPUExecutionProvider"])
    feed = dict(np.load(f"{folder}/{name}.npz"))
    right = feed.pop("out")
    assert np.array_equal(session.run(None, feed)[0], right), name
    try:
        session.run(None, {given: x[..., :-1] for given, x in feed.items()} | {"x0": feed["x0"][:, :-1]})
    except Exception as error:
        assert name in str(error), error
    else:
        raise AssertionError(f"{name}: no error")
print(onnxruntime.__version__, *names)
"""


@pytest.mark.parametrize(("version", "numpy"), VERSIONS)
def test_another_version(version, numpy, tmp_path):
    """The same bits, and errors for wrong shapes, without effattn or torch in the process."""
    names = []
    for operator in NODES:
        arguments = make_arguments(operator, operator.cases[0])
        (tmp_path / f"{operator.name}.onnx").write_bytes(node_model(operator, arguments))
        given = {f"x{i}": t.numpy() for i, t in enumerate(arguments[: operator.signature.num_activations])}
        with torch.no_grad():
            np.savez(tmp_path / f"{operator.name}.npz", out=first_of(operator(*arguments)).numpy(), **given)
        names.append(operator.name)
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-compile"]
    subprocess.run([*pip, "--target", packages, "--no-deps", f"onnxruntime=={version}", numpy], check=True)
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, str(effattn.onnxruntime.library()), str(tmp_path), *names],
        env={"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [version, *names], done.stdout + done.stderr
