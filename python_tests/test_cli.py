"""`loraxs`: the command line as a user calls it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import loraxs_ext
from loraxs_ext import cli, ops

from .store import stores

ROOT = Path(__file__).parents[1]


def loraxs(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraxs_ext.cli", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_version() -> None:
    result = loraxs("--version")
    assert result.returncode == 0
    assert result.stdout.strip() == f"loraxs_ext {loraxs_ext.__version__}"


def test_without_command_says_what_there_is() -> None:
    result = loraxs()
    assert result.returncode == 2
    assert "COMMAND" in result.stderr


def test_help_lists_every_command() -> None:
    result = loraxs("--help")
    assert result.returncode == 0
    for name, command in cli.COMMANDS.items():
        assert name in result.stdout and command.help in result.stdout


def test_doctor_json(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "file").write_bytes(b"12345")
    result = loraxs("doctor", "--json", LORAXS_CACHE=str(tmp_path), LORAXS_BACKEND="auto")
    report = json.loads(result.stdout)
    assert report["problems"] == []
    assert result.returncode == 0 and report["ok"] is True
    assert report["versions"]["loraxs_ext"] == loraxs_ext.__version__
    assert all(report["versions"][name] for name in cli.REQUIRED)
    assert report["cache"] == {"folder": str(tmp_path), "bytes": 5}
    assert set(report["owners"]) == set(ops.contract.OPS)
    assert report["devices"][0]["type"] == "cpu"
    assert 0.0 <= report["agreement"]["cpu"] < 1e-5
    assert report["cpu"]["isa"] in report["build"]["cpu_isas"]


def test_doctor_text_shows_the_owner_of_every_op() -> None:
    result = loraxs("doctor", LORAXS_BACKEND="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for op, owners in ops.backends.owners().items():
        assert owners["cpu"] in lines[op]
    assert result.stdout.rstrip().endswith("All well.")


def test_doctor_names_the_reference_backend() -> None:
    report = json.loads(loraxs("doctor", "--json", LORAXS_BACKEND="reference").stdout)
    assert any("LORAXS_BACKEND=reference" in note["what"] for note in report["notes"])
    assert {owners["cpu"] for owners in report["owners"].values()} == {"plain torch"}


@pytest.mark.parametrize(
    "arguments", [("--help",), ("doctor", "--json"), ("store", "list"), ("store", "list", "--json")], ids=" ".join
)
def test_a_reader_that_goes_away(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """`loraxs … | head`: the first line is there, nothing else is said, the status is that of SIGPIPE."""
    if arguments[0] == "store":
        with stores.create(tmp_path / "store", sync=False) as store:
            # More than a pipe takes.
            store.put_many([stores.row(f"{i:04}{'x' * 200}") for i in range(1000)])
        arguments += (str(tmp_path / "store"),)
    command = [sys.executable, "-m", "loraxs_ext.cli", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        if arguments[0] == "store":
            assert process.stdout.readline()
        # All that the others print fits the pipe.
        process.stdout.close()
        printed = process.stderr.read()
        assert process.wait(300) == 128 + 13, printed
    assert "Error" not in printed and "Traceback" not in printed and "loraxs store" not in printed


def test_without_any_output() -> None:
    command = f"{sys.executable} -m loraxs_ext.cli --version >&-"
    result = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_doctor_fails_on_a_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "REQUIRED", (*cli.REQUIRED, "no-such-package"))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "no-such-package is not installed" in printed and "pip install no-such-package" in printed


def test_doctor_fails_on_a_wrong_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *arguments, **options: right(*arguments, **options) + 0.1)
    assert cli.main(["doctor"]) == 1
    assert "loraxs::linear is wrong on cpu" in capsys.readouterr().out
