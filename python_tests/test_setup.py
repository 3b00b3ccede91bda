"""What setup.py says where something is missing: one sentence that names it and what to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"

# Runs setup.py in a process that cannot import some modules and takes itself for another interpreter.
SCRIPT = """
import runpy, sys
setup, sys.executable, hidden = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.modules.update(dict.fromkeys(hidden))
sys.argv = [setup, "--quiet", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
runpy.run_path(setup, run_name="__main__")
"""


def build(folder: Path, *hidden: str, python: str = sys.executable, **environment: str) -> str:
    """The last line of what a build says that fails before anything is compiled."""
    command = [sys.executable, "-c", SCRIPT, str(SETUP), python, *hidden]
    run = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode != 0 and "Traceback" not in run.stderr
    return run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("module", ["torch", "pybind11"])
def test_without_torch_or_pybind11(tmp_path, module):
    message = build(tmp_path, module)
    assert f"{module} is not importable here: install torch first" in message
    assert '`pip install "setuptools>=77" wheel cmake ninja pybind11`' in message
    assert message.endswith("`pip install --no-build-isolation .`")


@pytest.mark.parametrize("tool", ["cmake", "ninja"])
def test_without_build_tools(tmp_path, tool):
    # They are looked for beside the interpreter and on PATH; only the other one is there.
    other = tmp_path / {"cmake": "ninja", "ninja": "cmake"}[tool]
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    message = build(tmp_path, python=str(tmp_path / "python"), PATH="")
    assert message == f"loraxs-ext needs {tool} to compile: run `pip install {tool}` first"


def test_a_switch_that_is_neither_on_nor_off(tmp_path):
    assert build(tmp_path, LORAXS_NATIVE="maybe") == "LORAXS_NATIVE: expected on or off, got 'maybe'"
