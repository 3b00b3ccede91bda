"""`loraxs train` and `loraxs eval` as a user calls them, and the examples that run the same code."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraxs_ext import cli
from loraxs_ext.commands.train import report
from python_tests.training.tiny import reviews, save_bert, write_jsonl

yaml = pytest.importorskip("yaml")
pytest.importorskip("tensorboard")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "cache"))
    values = {
        "output": str(tmp_path / "run"),
        "model": {"name": save_bert(tmp_path / "bert")},
        "adapter": {"r": 4, "target_modules": ["query", "value"]},
        "data": {
            "train": write_jsonl(tmp_path / "train.jsonl", reviews(20)),
            "test": write_jsonl(tmp_path / "test.jsonl", reviews(6, seed=1)),
            "dev_size": 4,
        },
        "training": {"batch": 8, "cpu": True},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_train_and_eval(config, capsys):
    step = ["--set", "training.max_steps=2"]
    assert cli.main(["train", str(config), *step, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)  # nothing but the result
    assert result["steps"] == 2 and Path(result["adapter"], "adapter_config.json").exists()
    assert cli.main(["eval", str(config), *step, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    assert cli.main(["eval", str(config), *step]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert cli.main(["train", str(config), *step, "--set", "training.lr=1e-3"]) == 1
    assert "training.lr: was 0.004, is now 0.001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--set", "training.epoch=3"], 1, "training.epoch: unknown field; did you mean 'epochs'?"),
        (["--set", "adapter.rank_pattern.x=[]"], 1, "rank_pattern"),
        (["--set", "data.train=none.csv"], 1, "found nothing at none.csv"),
        (["--set", "data.text=[review]"], 1, "expected a value for 'review'; there are sentence, label"),
    ],
)
def test_mistakes_are_one_line(config, capsys, arguments, status, message):
    assert cli.main(["train", str(config), *arguments]) == status
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and printed.out == ""


def test_usage(config, capsys):
    for arguments in (["train"], ["train", str(config), "--set", "lr"], ["train", "--print-config", "gleu"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
    assert cli.main(["eval", str(config)]) == 1
    assert "expected a finished run" in capsys.readouterr().err


def test_one_process_speaks_for_all(capsys, monkeypatch):
    for rank, expected in (("0", "steps           3\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert report("train", argparse.Namespace(json=False), lambda _: {"steps": 3}) == 0
        assert capsys.readouterr().out == expected


def test_print_config(capsys):
    assert cli.main(["train", "--print-config", "math"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["training"]["lr"] == 4e-3 and "# learning rate of the adapter" in printed


def run_python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_line_does_not_load_the_trainer():
    code = "import sys, loraxs_ext.cli; print([n for n in ('transformers.trainer', 'datasets') if n in sys.modules])"
    assert run_python("-c", code).strip() == "[]"


@pytest.mark.parametrize("name", ["classification", "instruction_tuning"])
def test_examples_explain_themselves(name):
    assert f"python examples/{name}.py" in run_python(f"examples/{name}.py", "--help")


def test_the_classification_example_runs(config, tmp_path, monkeypatch, capsys):
    values = yaml.safe_load(config.read_text())
    options = {"model": values["model"]["name"], "train": values["data"]["train"], "test": values["data"]["test"]}
    options |= {"output": str(tmp_path / "example"), "rank": "4", "epochs": "1"}
    monkeypatch.setattr(sys, "argv", ["classification.py", *(f"--{name}={value}" for name, value in options.items())])
    source = (ROOT / "examples" / "classification.py").read_text(encoding="utf-8")
    exec(compile(source, "classification.py", "exec"), {"__name__": "__main__"})
    assert '"accuracy"' in capsys.readouterr().out
