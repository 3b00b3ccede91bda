"""Calibration data from files of all kinds, models of folders with it, and a head where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraxs_ext.advisor import batches_of, fit_head, load, measure, model_loss, read_texts
from loraxs_ext.peft import LoraXSConfig

from ..peft.models import CASES, VOCABULARY

ROWS = [(f"w{i} w{i + 1} w{i % 7}", str(i % 3)) for i in range(40)]


def save_model(folder: Path, kind: str) -> Path:
    """A tiny model with a tokeniser of the words w0, w1, …"""
    model = CASES[kind].base()
    words = {"[PAD]": 0, "[EOS]": 1, **{f"w{i}": i + 2 for i in range(VOCABULARY - 2)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[EOS]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad = {"pad_token": "[PAD]"} if kind == "bert" else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", **pad).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[tuple[str, str]] = ROWS) -> Path:
    """The rows in the format of the file's ending."""
    if path.suffix == ".txt":
        lines = [text for text, _ in rows]
    elif path.suffix == ".csv":
        lines = ["text,label,other", *(f'"{text}",{label},"a\nb"' for text, label in rows)]
    else:
        lines = [json.dumps({"text": text, "label": int(label)}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_all_rows_of_a_labelled_file(tmp_path: Path, kind: str) -> None:
    data = read_texts(write(tmp_path / f"a.{kind}"), 100, label="label")
    assert list(zip(data.texts, data.labels, strict=True)) == ROWS
    assert data.classes == ("0", "1", "2")


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_a_sample_is_repeatable_and_from_the_whole_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}")
    texts = [text for text, _ in ROWS]
    drawn = [read_texts(path, 8, seed=seed).texts for seed in range(30)]
    assert all(len(sample) == 8 and sorted(sample, key=texts.index) == list(sample) for sample in drawn)
    assert {text for sample in drawn for text in sample} == set(texts)
    assert drawn[3] == read_texts(path, 8, seed=3).texts and drawn[3] != drawn[4]


def test_classes_are_those_of_the_whole_file_in_their_own_order(tmp_path: Path) -> None:
    rows = [("w1", str(number)) for number in (10, 2, 0, 7, 1)]
    assert read_texts(write(tmp_path / "a.csv", rows), 1, label="label").classes == ("0", "1", "2", "7", "10")
    rows = [("w1", name) for name in ("positive", "negative", "10", "9")]
    assert read_texts(write(tmp_path / "b.csv", rows), 1, label="label").classes == ("9", "10", "negative", "positive")


@pytest.mark.parametrize(
    ("name", "content", "label", "message"),
    [
        ("a.parquet", b"x", None, "data: expected a .txt, .csv or .jsonl file, got 'a.parquet'"),
        ("a.txt", b"w1\n", "label", "data: expected a .csv or .jsonl file, which can hold labels"),
        ("a.txt", b"\n  \n", None, "data: expected rows with text, got none"),
        ("a.txt", b"w1\n\xff\n", None, "expected UTF-8 text"),
        ("a.txt", b"w" * (1 << 20), None, "line 1: expected a line below"),
        ("a.jsonl", b'{"text": "w1"}\n{"text"', None, "line 2: expected a JSON object"),
        ("a.jsonl", b'{"text": "w1"}\n["w2"]\n', None, "line 2: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": "w1"}\n{"texts": "w1"}\n', None, "line 2: expected a string .* under 'text'"),
        ("a.jsonl", b'{"text": "w1", "label": true}\n', "label", "line 1: expected a string .* under 'label'"),
        ("a.csv", b"texts,label\nw1,0\n", None, r"line 2: expected a string .* 'text', got None among \['texts'"),
        ("a.csv", b"text,label\nw1\n", "label", "line 2: expected a string .* under 'label'"),
        ("a.csv", b'text\n"' + b"w" * 200_000 + b'"\n', None, "expected UTF-8 text in CSV"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(
    tmp_path: Path, name: str, content: bytes, label: str | None, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name, 10, label=label)


def test_causal_batches_predict_every_token_but_padding(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    data = read_texts(write(tmp_path / "a.txt", [("w1 w2 w3 w4 w5", ""), ("w6 w7", ""), ("w8", "")]), 10)
    subject = load(folder, "causal", data, batch=2, max_tokens=4)
    assert subject.new == [] and len(subject.batches) == 2
    first = subject.batches[0]
    assert first["input_ids"].shape == (2, 4)
    assert first["labels"].tolist() == [[3, 4, 5, 6], [8, 9, -100, -100]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert torch.isfinite(model_loss(subject.model, first))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_of_another_width_gets_a_head_that_is_fitted(tmp_path: Path, kind: str) -> None:
    folder = save_model(tmp_path, kind)
    data = read_texts(write(tmp_path / "a.csv"), 24, label="label")
    subject = load(folder, "classification", data, batch=6)
    again = load(folder, "classification", data, batch=6)
    assert sum(p.numel() for p in subject.new) == (99 if kind == "bert" else 96)
    assert all(torch.equal(a, b) for a, b in zip(subject.new, again.new, strict=True)), "a seed decides the new head"
    before = sum(float(model_loss(subject.model, batch)) for batch in subject.batches)
    frozen = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    fit_head(subject.model, subject.batches, subject.new, epochs=20, progress=False)
    assert sum(float(model_loss(subject.model, batch)) for batch in subject.batches) < before
    new = {id(p) for p in subject.new}
    for name, parameter in subject.model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, frozen[name]) is (id(parameter) not in new)
    config = LoraXSConfig(target_modules="all-linear", task_type="SEQ_CLS")
    found = measure(subject.model, subject.batches, config, 2, progress=False)
    assert found and not any("classifier" in module.name or "score" in module.name for module in found)


def test_a_trained_head_keeps_its_classes(tmp_path: Path) -> None:
    model = CASES["bert"].base()
    model.config.label2id, model.config.id2label = {"bad": 0, "good": 1}, {0: "bad", 1: "good"}
    save_model(tmp_path, "bert")
    model.save_pretrained(tmp_path)
    rows = [("w1", "good"), ("w2", "bad")]
    subject = load(tmp_path, "classification", read_texts(write(tmp_path / "a.csv", rows), 10, label="label"))
    assert subject.new == [] and subject.batches[0]["labels"].tolist() == [1, 0]
    rows = [("w1", "1"), ("w2", "0")]
    subject = load(tmp_path, "classification", read_texts(write(tmp_path / "a.csv", rows), 10, label="label"))
    assert subject.new == [] and subject.batches[0]["labels"].tolist() == [1, 0]
    rows = [("w1", "yes"), ("w2", "no")]
    with pytest.raises(ValueError, match=r"data: expected labels of the model's classes \['bad', 'good'\]"):
        load(tmp_path, "classification", read_texts(write(tmp_path / "a.csv", rows), 10, label="label"))


def test_folders_and_labels_that_do_not_do(tmp_path: Path) -> None:
    data = read_texts(write(tmp_path / "a.csv"), 5, label="label")
    with pytest.raises(ValueError, match="MODEL: expected a folder of a transformers model"):
        load(tmp_path, "classification", data)
    save_model(tmp_path, "bert")
    one = read_texts(write(tmp_path / "b.csv", [("w1", "a"), ("w2", "a")]), 5, label="label")
    with pytest.raises(ValueError, match="data: expected labels of at least 2 classes, got .'a'"):
        load(tmp_path, "classification", one)


def test_batches_of_labels() -> None:
    words = {"[PAD]": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    made = batches_of(fast, ["a b", "b", "a"], [2, 0, 1], batch=2)
    assert [batch["labels"].tolist() for batch in made] == [[2, 0], [1]]
    assert made[0]["input_ids"].tolist() == [[1, 2], [2, 0]]
