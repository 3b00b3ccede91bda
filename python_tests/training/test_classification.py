"""Classification and regression, from rows to predictions, and from one task to the next."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraxs_ext.training import make_run
from loraxs_ext.training.classification import Labels, Pad, encode, read_splits, read_test
from loraxs_ext.training.evaluate import evaluate
from loraxs_ext.training.settings import ClassificationData
from loraxs_ext.training.tables import Table
from loraxs_ext.training.train import train
from loraxs_ext.training.trainer import adamw

from .tiny import reviews, save_bert, write_jsonl

pytest.importorskip("tensorboard")


def labels_of(values: list, **changes) -> Labels:
    data = ClassificationData(train="t", text=["s"], **changes)
    return Labels.of(data, Table("t", [{"s": "", "label": value} for value in values], {}))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 2, 1], ["1", "2", "10"]),
        (["10", "2"], ["2", "10"]),
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["0", "1"]),
        (["-1", "1"], ["-1", "1"]),
    ],
)
def test_class_names(values, names):
    labels = labels_of(values)
    assert labels.names == names
    table = Table("other", [], {})
    assert [labels.number(value, table, "label") for value in values] == [
        names.index(str(int(v)) if not isinstance(v, str) else v) for v in values
    ]
    with pytest.raises(ValueError, match="other: label: expected one of"):
        labels.number("new", table, "label")


def test_class_names_of_a_datasets_folder():
    table = Table("t", [{"s": "", "label": 1}], {"label": ["no", "yes"]})
    labels = Labels.of(ClassificationData(train="t", text=["s"]), table)
    assert labels.names == ["no", "yes"] and labels.number(1, table, "label") == 1
    # The same labels by name, from another file, in another order of the settings.
    assert Labels(["yes", "no"]).number(1, table, "label") == 0
    assert Labels(["yes", "no"]).number("no", Table("f", [], {}), "label") == 1


def test_one_class_is_not_enough():
    with pytest.raises(ValueError, match="expected at least two classes"):
        labels_of(["a", "a"])


def test_regression_labels_are_numbers():
    labels = labels_of([1.5, 2], regression=True)
    assert labels.names is None and labels.number("1.5", Table("t", [], {}), "label") == 1.5
    with pytest.raises(ValueError, match="expected a number, got 'high'"):
        labels.number("high", Table("t", [], {}), "label")
    assert labels.prediction(np.array([2.5])) == {"prediction": 2.5}


def test_pairs_and_dynamic_padding(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    data = ClassificationData(train="t", text=["a", "b"], max_length=8)
    rows = [
        {"a": "good film", "b": "bad", "label": "x"},
        {"a": "the plot is", "b": "the cast is fine and", "label": "y"},
    ]
    examples = encode(Table("t", rows, {}), data, Labels(["x", "y"]), tokenizer)
    batch = Pad(tokenizer)(examples)
    assert [len(example["input_ids"]) for example in examples] == [5, 8]
    assert batch["input_ids"].shape == (2, 8) and batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [5, 8]
    assert tokenizer.decode(batch["input_ids"][0]).split()[:5] == ["<s>", "good", "film", "<s>", "bad"]


def test_hidden_and_partial_test_labels(tmp_path):
    data = ClassificationData(train="t", text=["s"], test=write_jsonl(tmp_path / "t.jsonl", [{"s": "a"}, {"s": "b"}]))
    table, labelled = read_test(data)
    assert len(table) == 2 and not labelled
    data.test = write_jsonl(tmp_path / "u.jsonl", [{"s": "a", "label": "x"}, {"s": "b"}])
    with pytest.raises(ValueError, match="expected labels in all rows or in none, got 1 of 2"):
        read_test(data)


def test_train_then_evaluate(review_run):
    changes = {"training.epochs": 3, "training.best": "matthews"}
    run = make_run(review_run, changes)
    result = train(run)
    head = 2 * 16 + 2
    assert result["parameters"]["head"] == head and result["parameters"]["adapter"] % 16 == 0
    assert result["labels"] == ["negative", "positive"] and result["rows"] == {"train": 36, "dev": 12}
    stored = load_file(Path(result["adapter"]) / "adapter_model.safetensors")
    cores = sum(t.numel() for name, t in stored.items() if name.endswith("loraxs_R.weight"))
    assert cores == result["parameters"]["adapter"] and result["bytes"] < 30_000
    assert list((Path(run.output) / "tensorboard").iterdir())

    outcome = evaluate(run)
    written = [json.loads(line) for line in Path(outcome["predictions"]).read_text().splitlines()]
    truth = [row["label"] for row in reviews(20, seed=1)]
    assert [entry["label"] for entry in written] == truth
    right = np.mean([entry["prediction"] == entry["label"] for entry in written])
    assert outcome["accuracy"] == pytest.approx(right) and outcome["rows"] == 20
    assert all(0.5 <= entry["probability"] <= 1 for entry in written)
    # The rows of dev give what the Trainer measured on them, so the adapter and its head are what was trained.
    _, dev, _ = read_splits(run.data)
    again = evaluate(
        make_run(review_run, {**changes, "data.test": write_jsonl(Path(run.output) / "dev.jsonl", dev.rows)})
    )
    for name in ("accuracy", "f1", "matthews"):
        assert again[name] == pytest.approx(result["dev"][name])


def test_nothing_trained_is_nothing_to_evaluate(review_run):
    with pytest.raises(FileNotFoundError, match="output: expected a finished run"):
        evaluate(make_run(review_run))
    with pytest.raises(ValueError, match="base: expected an instruction run"):
        evaluate(make_run(review_run), base=True)


def test_regression_run(review_run, tmp_path):
    values = [{"sentence": row["sentence"], "label": 4.5 if row["label"] == "positive" else 1} for row in reviews(40)]
    review_run["data"] |= {"train": write_jsonl(tmp_path / "r.jsonl", values), "regression": True}
    review_run["data"]["test"] = review_run["data"]["train"]
    run = make_run(review_run, {"training.max_steps": 3})
    result = train(run)
    assert result["chosen_by"] == "correlation" and result["labels"] is None
    assert evaluate(run).keys() >= {"pearson", "spearman", "mse"}


def test_two_learning_rates(bert, review_run):
    run = make_run(review_run)
    base = AutoModelForSequenceClassification.from_pretrained(bert)
    model = get_peft_model(base, run.adapter_config())
    optimizer = adamw(model, run.training)
    names = {id(p): n for n, p in model.named_parameters()}
    adapter, head = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 2e-2]
    assert adapter and all("loraxs_R" in name for name in adapter)
    assert head and all("classifier.modules_to_save" in name for name in head)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(adapter + head) == sorted(trainable)


def test_weights_that_would_stay_random_are_refused(review_run, tmp_path):
    review_run["model"]["name"] = save_bert(tmp_path / "bare", pooler=False)
    with pytest.raises(ValueError, match=r"no weights for bert\.pooler\.dense\.bias.*adapter\.modules_to_save"):
        train(make_run(review_run))
    run = make_run(
        review_run, {"adapter.modules_to_save": ["pooler"], "training.max_steps": 1, "output": str(tmp_path / "o")}
    )
    stored = load_file(Path(train(run)["adapter"]) / "adapter_model.safetensors")
    assert any("pooler" in name for name in stored)


def test_half_precision_base_with_a_float_head(review_run):
    run = make_run(review_run, {"model.dtype": "bfloat16", "training.max_steps": 2})
    stored = load_file(Path(train(run)["adapter"]) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert evaluate(run)["rows"] == 20


@pytest.fixture
def three_classes(review_run, tmp_path) -> dict:
    """A finished run on three classes."""
    rows = [{**row, "label": ("contradiction", "entailment", "neutral")[i % 3]} for i, row in enumerate(reviews(30))]
    data = {**review_run["data"], "train": write_jsonl(tmp_path / "nli.jsonl", rows)}
    values = {**review_run, "data": data, "output": str(tmp_path / "nli")}
    return train(make_run(values, {"training.max_steps": 3}))


def first_state(review_run, **changes) -> tuple[dict, dict]:
    """The adapter as it is before its first step, and the result of one step that changes nothing."""
    result = train(
        make_run({**review_run, **changes}, {"training.max_steps": 1, "training.lr": 1e-30, "training.head_lr": 1e-30})
    )
    return load_file(Path(result["adapter"]) / "adapter_model.safetensors"), result


def test_continuing_keeps_R_and_says_what_starts_afresh(review_run, three_classes):
    old = load_file(Path(three_classes["adapter"]) / "adapter_model.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new, result = first_state(review_run, start_from=three_classes["adapter"])
    cores = [name for name in old if name.endswith("loraxs_R.weight")]
    assert cores and all(torch.equal(old[name], new[name]) for name in cores)
    message = "classifier.weight starts afresh: [2, 16] here, [3, 16] there"
    assert any(message in str(warning.message) for warning in caught)
    assert any(message in note for note in result["continued"]) and len(result["continued"]) == 2


def test_continuing_keeps_a_head_that_fits(review_run, three_classes):
    review_run["data"]["train"] = str(Path(three_classes["adapter"]).parents[1] / "nli.jsonl")
    old = load_file(Path(three_classes["adapter"]) / "adapter_model.safetensors")
    new, result = first_state(review_run, start_from=three_classes["adapter"], keep_head="all")
    assert result["continued"] == [] and all(torch.equal(old[name], new[name]) for name in old)
    review_run["output"] += "-afresh"
    new, result = first_state(review_run, start_from=three_classes["adapter"], keep_head="none")
    head = "base_model.model.classifier.weight"
    assert len(result["continued"]) == 2 and not torch.equal(old[head], new[head])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_head": "all"}, "keep_head: expected a head that fits"),
        ({"adapter.r": 3}, r"adapter\.r: expected 4, as in start_from"),
        ({"adapter.sigma": "sqrt"}, "adapter: expected the basis of start_from"),
        ({"adapter.target_modules": ["query"]}, "start_from: expected the same target modules"),
        ({"start_from": "nowhere"}, "nowhere"),
    ],
)
def test_continuing_from_what_does_not_fit(review_run, three_classes, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(make_run(review_run, {"start_from": three_classes["adapter"], **changes}))
