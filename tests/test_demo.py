"""The demo runs from end to end, on images small enough for a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo.py"


def test_demo(tmp_path):
    picture = tmp_path / "demo.png"
    command = [sys.executable, str(DEMO), "--quick", "--output", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 replaced, 0 left alone" in done.stdout
    assert done.stdout.count("equal") == 2, "the same five best classes for both images"
    assert picture.read_bytes().startswith(b"\x89PNG")
