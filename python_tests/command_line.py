"""The command line inside a test: its exit status, and what it prints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loraxs_ext import cli


def run(*arguments: object) -> int:
    """The exit status of `loraxs ARGUMENTS`."""
    return cli.main([*map(str, arguments)])


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)
