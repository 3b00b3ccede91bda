"""A configuration is checked before anything is loaded, and every complaint names the field."""

from __future__ import annotations

import pytest

from loraxs_ext.training import PRESETS, TASKS, commented_yaml, make_run, read_run
from loraxs_ext.training.settings import differences

yaml = pytest.importorskip("yaml")

MINIMAL = {"output": "out", "model": {"name": "m"}, "data": {"train": "t.csv"}}
INSTRUCTION = {**MINIMAL, "task": "instruction"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "modle: unknown field; did you mean 'model'?"),
        ({"training": {"learning_rte": 1}}, "training.learning_rte: unknown field; there are lr, "),
        ({"training": {"warmpu": 1}}, "training.warmpu: unknown field; did you mean 'warmup'?"),
        ({"adapter": {"lora_alhpa": 1}}, "adapter.lora_alhpa: unknown field; did you mean 'lora_alpha'?"),
        ({"adapter": {"task_type": "CAUSAL_LM"}}, "adapter.task_type: unknown field"),
        ({"adapter": {"r": 0}}, "adapter.r: expected a positive integer, got 0"),
        ({"adapter": {"r": "four"}}, "adapter.r: expected an int, got 'four'"),
        ({"adapter": {"init_std": "much"}}, "adapter.init_std: expected a number, got 'much'"),
        ({"preset": "gleu"}, "preset.gleu: unknown field; did you mean 'glue'?"),
        ({"task": "regression"}, "task.regression: unknown field"),
        ({"training": {"lr": 0}}, "training.lr: expected a positive number, got 0.0"),
        ({"training": {"lr": True}}, "training.lr: expected a number, got True"),
        ({"training": {"batch": 1.5}}, "training.batch: expected a whole number, got 1.5"),
        ({"training": {"cpu": 1}}, "training.cpu: expected true or false, got 1"),
        ({"training": {"scheduler": "cosin"}}, "training.scheduler: expected 'linear' or 'cosine'"),
        ({"training": {"best": "bleu"}}, "training.best: expected one of accuracy, f1, matthews, loss, got 'bleu'"),
        ({"training": {"seed": -1}}, "training.seed: expected a number of at least 0, got -1"),
        ({"training": 3}, "training: expected fields and values, got 3"),
        ({"data": {"train": "t", "text": "sentence"}}, "data.text: expected a list, got 'sentence'"),
        ({"data": {"train": "t", "text": ["a", "b", "c"]}}, "data.text: expected one or two columns"),
        ({"data": {"train": "t", "labels": ["a", "a"]}}, "data.labels: expected two or more different names"),
        ({"data": {"train": "t", "dev_size": 0}}, "data.dev_size: expected a positive number, got 0.0"),
        ({"data": {"train": "t", "prompt": "p"}}, "data.prompt: unknown field"),
        ({"output": ""}, "output: expected a value, got ''"),
        ({"model": {}}, "model.name: expected a value, got ''"),
        ({"preset": "glue-from-mnli"}, "start_from: expected the folder of an adapter trained on MNLI, got None"),
        ({"task": "instruction", "data": {"train": "t", "template": "alpca"}}, "data.template: expected 'alpaca'"),
        ({"task": "instruction", "generation": {"beams": 0}}, "generation.beams: expected a positive number, got 0"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError) as caught:
        make_run({**MINIMAL, **values})
    assert message in str(caught.value)


def test_numbers_as_yaml_gives_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "output: o\nmodel: {name: m}\ndata: {train: t}\ntraining: {lr: 1e-3, epochs: 2}\nadapter: {init_std: 1e-6}"
    )
    run = read_run(path, {"training.head_lr": "2e-3", "training.warmup": 0.1})
    assert (run.training.lr, run.training.head_lr, run.training.warmup, run.training.epochs) == (1e-3, 2e-3, 0.1, 2.0)
    assert run.adapter_config().init_std == 1e-6


@pytest.mark.parametrize("text", ["- a\n", "a: [", "training: {lr: 1}\ntraining: {lr: 2}\n", ""])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        read_run(path)


def required(name: str) -> dict:
    """What a preset leaves to the user."""
    needs_start = {"start_from": "s"} if name == "glue-from-mnli" else {}
    return {"preset": name, "output": "out", "data": {"train": "t.csv"}, **needs_start}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    run = make_run(required(name))
    assert all(choice.source for choice in PRESETS[name].choices.values())
    assert run.adapter["r"] == PRESETS[name].choices["adapter.r"].value
    assert run.model.name == PRESETS[name].choices["model.name"].value
    # Everything can be overridden, from the file and from the command line.
    assert make_run({**required(name), "training": {"lr": 7.0}}).training.lr == 7.0
    assert make_run({**required(name), "training": {"lr": 7.0}}, {"training.lr": 8.0}).training.lr == 8.0
    assert make_run({**required(name), "adapter": {"r": 3}}).adapter_config().r == 3


def test_reference_values():
    glue, mnli, math = (make_run(required(name)) for name in ("glue", "glue-from-mnli", "math"))
    assert (glue.training.epochs, glue.training.warmup, glue.training.batch) == (10, 0.06, 32)
    assert (mnli.training.epochs, mnli.training.warmup, mnli.keep_head) == (50, 0, "matching")
    assert glue.adapter_config().target_modules == {"query", "value", "attention.output.dense", "output.dense"}
    assert math.training.batch * math.training.accumulate == 128 and math.training.scheduler == "cosine"
    assert math.adapter_config().lora_alpha == math.adapter_config().r == 64


@pytest.mark.parametrize("name", [*PRESETS, *TASKS])
def test_the_printed_file_is_the_preset(name):
    text = commented_yaml(name)
    printed = yaml.safe_load(text)
    assert max(map(len, text.splitlines())) <= 120
    given = required(name) if name in PRESETS else {"task": name, "output": "out", "data": {"train": "t.csv"}}
    given = {**given, "model": {"name": "m"}}
    printed |= {k: v for k, v in given.items() if k in ("output", "start_from")}
    printed["data"]["train"], printed["model"]["name"] = "t.csv", "m"
    expected = make_run(given).to_dict()
    if name in TASKS:
        expected["adapter"] = printed["adapter"]
    assert make_run(printed).to_dict() == expected


def test_differences_name_fields():
    before, after = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "e": 1}
    assert differences(before, after) == ["a.b: was 1, is now 2", "e: was None, is now 1"]
