"""Dry runs: Triton's kernels on the CPU, by its interpreter with the corrections that the kernels' own tests need."""

from __future__ import annotations

import importlib.util

# What the process must find in its environment before anything imports Triton.
ENVIRONMENT = {"TRITON_INTERPRET": "1"}


def correct_the_interpreter() -> None:
    """Patch Triton's interpreter in this process, where Triton is installed."""
    if importlib.util.find_spec("triton") is not None:
        from python_tests.ops.triton import interpreter_fixes

        interpreter_fixes.apply()
