"""Compiles the CUDA kernels' source for the CPU, by the shim of csrc/testing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++")
_FLAGS = ("-std=c++20", "-O1", "-g", "-fno-sanitize-recover=all")


def build(source: str, output: Path, *flags: str) -> Path:
    """The compiled csrc/testing/`source`; skips the test where there is no g++."""
    if COMPILER is None:
        pytest.skip("g++ is not installed")
    subprocess.run(
        [COMPILER, *_FLAGS, *flags, f"-I{CSRC}", str(CSRC / "testing" / source), "-o", str(output)], check=True
    )
    return output
