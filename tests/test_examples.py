"""The examples run from end to end, on inputs small enough for a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, picture, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments, "--output", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    return done.stdout


def test_demo(tmp_path):
    text = run("demo.py", tmp_path / "demo.png", "--quick")
    assert "7 replaced, 0 left alone" in text
    assert text.count("equal") == 2, "the same five best classes for both images"


@pytest.mark.full
def test_train(tmp_path):
    text = run("train.py", tmp_path / "train.png", "--epochs", "1", "--steps", "2")
    assert text.count("accelerated") == 2 and text.count("stock") == 2
    assert "effattn in float16: 100.0% of the outputs finite" in text
