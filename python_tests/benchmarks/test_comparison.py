"""The comparison with other adapters: its checks, what it trains and when, and the table that comes of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.comparison import runs
from benchmarks.comparison.checks import CheckFailed, check
from benchmarks.comparison.methods import ANCHOR, METHODS, Method
from benchmarks.comparison.report import draw, markdown
from benchmarks.comparison.results import Results
from benchmarks.comparison.runs import Data, best_rate, run_cell
from benchmarks.comparison.summary import differences
from benchmarks.comparison.training import Protocol, batches, step
from examples.demo.model import TextClassifier
from examples.demo.train import collate

SMALL = Protocol(train=24, dev=12, test=16, epochs=1, batch=8)
LORA = METHODS["LoRA r = 1 on query, value"]


def base() -> nn.Module:
    """The same tiny frozen model each time."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=40, **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return TextClassifier(BertModel(config, add_pooling_layer=False), 2)


@pytest.fixture
def data() -> Data:
    draw = random.Random(0)

    def rows(count: int) -> list[dict]:
        made = []
        for number in range(count):
            words = [draw.randrange(1, 20) + 20 * (number % 2) for _ in range(draw.randrange(3, 8))]
            made.append({"input_ids": words, "labels": number % 2})
        return made

    parts = {"train": rows(SMALL.train), "dev": rows(SMALL.dev), "test": rows(SMALL.test)}
    return Data("words", parts, 0.5, base, 2)


@pytest.fixture
def batch(data: Data) -> dict[str, torch.Tensor]:
    return collate(data.parts["train"][:8])


# Trainable numbers on the tiny model: 4 matrices of 32 × 32, one of 64 × 32 and one of 32 × 64 in all.
SIZES = {
    "head only": 0,
    ANCHOR: 6 * 16 * 16,
    "EDoRA r = 16": 6 * 16 * 16 + 5 * 32 + 64,
    "TinyLoRA r = 16, u = 64": 6 * 64,
    LORA.name: 2 * (32 + 32),
    "DoRA r = 8": 8 * (4 * 64 + 2 * 96) + 5 * 32 + 64,
    "VeRA r = 384 on query, value": 2 * (384 + 32),
    "PEFT TinyLoRA r = 16, u = 64": 6 * 64,
}


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("name", SIZES)
def test_methods_pass_their_check(name, batch):
    facts = check(METHODS[name], base, batch, parameters=SIZES[name])
    assert (facts["parameters"], facts["head"]) == (SIZES[name], 2 * 32 + 2)
    assert 4 * SIZES[name] < facts["bytes"] < facts["file_bytes"]


def random_start(seed: int) -> LoraConfig:
    return LoraConfig(r=1, target_modules=["query"], modules_to_save=["head"], init_lora_weights=False)


def with_biases(seed: int) -> LoraConfig:
    return LoraConfig(r=1, target_modules=["query"], modules_to_save=["head"], bias="all")


class Forgetful(Method):
    """Loads its configuration, not its weights."""

    def reload(self, base: nn.Module, folder: Path) -> nn.Module:
        return get_peft_model(base, self.config(0))


class Drifting(Method):
    """Moves frozen weights when it trains."""

    def build(self, base: nn.Module, seed: int) -> nn.Module:
        model = super().build(base, seed)
        weight = base.encoder.embeddings.word_embeddings.weight

        def drift(module: nn.Module, *_: object) -> None:
            if module.training:
                weight.data.add_(1.0)

        model.register_forward_hook(drift)
        return model


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        (replace(LORA, config=random_start), 64, "embeddings at the start"),
        (replace(LORA, config=with_biases), 64, "trainable: expected"),
        (LORA, 127, "trainable numbers: expected 127, got 128"),
        (replace(LORA, trains=("lora_A", "lora_B", "magnitude")), 128, "without .'magnitude'"),
        (Drifting(**vars(LORA)), 128, "got also .'base_model.model.encoder.embeddings.word_embeddings.weight'"),
        (Forgetful(**vars(LORA)), 128, "logits after saving and loading"),
    ],
    ids=["start", "biases", "size", "missing", "frozen", "reload"],
)
def test_a_method_that_breaks_its_claim_fails(method, parameters, message, batch):
    with pytest.raises(CheckFailed, match=message):
        check(method, base, batch, parameters=parameters)


@pytest.fixture
def trained(monkeypatch) -> list[tuple[float, int]]:
    """(rate, seed) of every run that is trained."""
    calls = []
    train = runs.train

    def watched(model, method, rows, protocol, rate, seed, label):
        calls.append((rate, seed))
        return train(model, method, rows, protocol, rate, seed, label)

    monkeypatch.setattr(runs, "train", watched)
    return calls


def test_a_cell_is_tuned_on_dev_scored_once_and_not_trained_again(data, tmp_path, trained, monkeypatch):
    read = []
    predict = runs.predict
    monkeypatch.setattr(runs, "predict", lambda model, rows: (read.append(len(rows)), predict(model, rows))[1])
    results, work = Results(tmp_path / "r.json", SMALL), tmp_path / "work"
    run_cell(data, LORA, (0, 1), SMALL, results, work)
    best = best_rate(results.rows(seed=0), LORA.rates)
    assert trained == [*((rate, 0) for rate in LORA.rates), (best, 1)]
    scored = [row for row in results.rows() if "test_accuracy" in row]
    assert {(row["rate"], row["seed"]) for row in scored} == {(best, 0), (best, 1)}
    assert read.count(SMALL.test) == 2
    for row in scored:
        assert row["test_right"].count("1") == round(SMALL.test * row["test_accuracy"])

    run_cell(data, LORA, (0, 1), SMALL, Results(tmp_path / "r.json", SMALL), work)
    assert len(trained) == 4 and read.count(SMALL.test) == 2
    run_cell(data, LORA, (0, 1, 2), SMALL, Results(tmp_path / "r.json", SMALL), work)
    assert trained[4:] == [(best, 2)]


def test_what_was_cut_off_goes_on(data, tmp_path, trained, monkeypatch):
    results, work = Results(tmp_path / "r.json", SMALL), tmp_path / "work"
    score = runs._score
    monkeypatch.setattr(runs, "_score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_cell(data, LORA, (0,), SMALL, results, work)
    assert len(results.rows()) == 3 and not results.rows()[0].keys() & {"test_accuracy"}
    monkeypatch.setattr(runs, "_score", score)
    run_cell(data, LORA, (0,), SMALL, results, work)
    assert len(trained) == 3 and sum("test_accuracy" in row for row in results.rows()) == 1
    assert not [path for path in work.rglob("*") if path.name.startswith(".")]


def test_seeds_repeat_and_differ(data):
    def losses(seed: int) -> list[float]:
        model = METHODS[ANCHOR].build(base(), seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return [step(model, optimizer, batch) for batch in batches(data.parts["train"], SMALL, seed)]

    first = losses(0)
    assert losses(0) == first and losses(1) != first


def test_another_protocol_is_refused(tmp_path):
    Results(tmp_path / "r.json", SMALL).note("tasks", "words", {"majority": 0.5})
    with pytest.raises(ValueError, match="protocol: expected"):
        Results(tmp_path / "r.json", replace(SMALL, epochs=2))


def test_the_best_rate_is_the_smaller_of_equals_and_never_a_diverged_one():
    def row(rate: float, accuracy: float, loss: float = 0.5) -> dict:
        return {"rate": rate, "dev_accuracy": accuracy, "loss": loss}

    rows = [row(1.0, 0.9), row(0.1, 0.9), row(0.01, 0.8), row(10.0, 0.99, float("nan")), row(5.0, 1.0)]
    assert best_rate(rows, (0.01, 0.1, 1.0, 10.0)) == 0.1


def synthetic() -> dict:
    """Two tasks and three methods: one complete, one with a seed less on one task, one that is only being tuned."""

    def run(task: str, method: str, seed: int, right: str, rate: float = 5e-3) -> dict:
        made = {"task": task, "method": method, "seed": seed, "rate": rate, "dev_accuracy": 0.5, "loss": 0.1}
        return {**made, "test_accuracy": right.count("1") / len(right), "test_right": right}

    def tuned(task: str, method: str, *rates: float) -> list[dict]:
        rest = {"task": task, "method": method, "seed": 0, "dev_accuracy": 0.4, "loss": 0.1}
        return [{**rest, "rate": rate} for rate in rates]

    rows = [*tuned("a", ANCHOR, 1e-3, 1e-2), run("a", ANCHOR, 0, "1110"), run("a", ANCHOR, 1, "1100")]
    rows += [*tuned("b", ANCHOR, 1e-3, 1e-2), run("b", ANCHOR, 0, "1111"), run("b", ANCHOR, 1, "1111")]
    rows += [*tuned("a", LORA.name, 1e-3, 3e-3), run("a", LORA.name, 0, "1111"), run("a", LORA.name, 1, "1101")]
    rows += [*tuned("b", LORA.name, 1e-3, 1e-2), run("b", LORA.name, 0, "0111")]
    rows += tuned("a", "DoRA r = 8", 1e-3)
    task = {"majority": 0.5, "converged_head": {"accuracy": 0.625, "decay": 0.1}}
    step = {"median_us": 123456.0, "p10_us": 120000.0, "p90_us": 130000.0, "samples": 20}
    return {
        "kind": "comparison",
        "environment": {},
        "tasks": {"a": task, "b": task},
        "methods": {ANCHOR: {"parameters": 9216, "bytes": 58568}, LORA.name: {"parameters": 128, "bytes": 1000}},
        "speed": {"methods": {ANCHOR: {"step": step, "over_loraxs": 1.0, "peak_bytes": [2**20, 5 * 2**20, 3 * 2**20]}}},
        "rows": rows,
    }


def test_the_table_shows_what_is_there_and_what_is_not():
    text = markdown(synthetic())
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines() if "|" in line}
    assert lines["most frequent class"][2:4] == ["50.0", "50.0"]
    assert lines["converged head"][2:4] == ["62.5", "62.5"]
    assert lines[ANCHOR][:5] == ["9,216", "58,568", "62.5 ± 17.7", "100.0 ± 0.0", "0"]
    assert lines[ANCHOR][5:] == ["123 (120–130), 1.00×", "3 |"]
    assert lines[LORA.name][2:4] == ["87.5 ± 17.7", "75.0 (1 of 2 seeds)"]
    assert lines[LORA.name][5:] == ["–", "– |"]
    assert lines["DoRA r = 8"] == ["–", "–", "–", "–", "–", "–", "– |"]
    assert f"edge of its grid in 1 of 4 cells: {LORA.name} on a (0.005)" in text


def test_differences_are_paired_by_seed_and_row():
    found = differences(synthetic(), ANCHOR)
    assert set(found) == {LORA.name}
    assert found[LORA.name]["a"]["by_seed"] == {"0": 0.25, "1": 0.25}
    assert found[LORA.name]["a"]["spread"] == 0.0
    assert found[LORA.name]["b"] == {
        "by_seed": {"0": -0.25},
        "mean": -0.25,
        "spread": None,
        "rows_error": pytest.approx(0.25),
    }
    assert found[LORA.name]["all"]["mean"] == 0.0 and found[LORA.name]["all"]["tasks"] == 2


def test_the_figure_is_written_whole(tmp_path):
    pytest.importorskip("matplotlib")
    draw(synthetic(), tmp_path / "some" / "comparison.png")
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["comparison.png"]
    assert (tmp_path / "some" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_written_in_place_of_their_equals(tmp_path):
    results = Results(tmp_path / "r.json", SMALL)
    row = {"task": "a", "method": "m", "rate": 0.1, "seed": 0, "loss": 1.0, "dev_accuracy": 0.5}
    results.put(row)
    results.put({**row, "seed": 1})
    results.put({**row, "test_accuracy": 0.5, "test_right": "01"})
    content = json.loads((tmp_path / "r.json").read_text())
    assert [(row["seed"], "test_right" in row) for row in content["rows"]] == [(1, False), (0, True)]
    assert content["environment"]["device"] and "commit" in content["rows"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
