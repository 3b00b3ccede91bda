"""Instruction tuning: what is learnt, what is generated, and what is kept of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraxs_ext.training import make_run
from loraxs_ext.training.evaluate import evaluate
from loraxs_ext.training.generation import AnswersFile, Writer, answer_all
from loraxs_ext.training.instruction import IGNORED, Pad, Template, encode, read_splits
from loraxs_ext.training.settings import GenerationSettings, InstructionData
from loraxs_ext.training.tables import Table
from loraxs_ext.training.train import train

from .tiny import save_llama, save_tokenizer, sums

pytest.importorskip("tensorboard")

ROW = {"prompt": "1 + 2", "response": "The answer is : 3 ."}


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer", chat=True)


def template(tokenizer, **changes) -> Template:
    return Template(InstructionData(train="t", **changes), tokenizer)


def test_templates(tokenizer):
    alpaca = template(tokenizer, input="more")
    assert alpaca.prompt(ROW).endswith("### Instruction:\n1 + 2\n\n### Response:")
    assert "### Input" not in alpaca.prompt({**ROW, "more": ""})
    assert "\n\n### Input:\n{prompt}\n\n### Response:" in alpaca.prompt({**ROW, "more": "{prompt}"})
    assert alpaca.response(ROW) == "The answer is : 3 .</s>"
    assert template(tokenizer, template="plain", input="more").prompt({**ROW, "more": "="}) == "1 + 2\n="
    assert template(tokenizer, template="Q {prompt} {x} A").prompt({"prompt": "{input}"}) == "Q {input} {x} A"
    chat = template(tokenizer, template="chat")
    assert chat.prompt(ROW) == "<user> 1 + 2 </s> <bot> "
    assert chat.response(ROW) == "The answer is : 3 . </s>"


def test_chat_templates_that_do_not_fit(tokenizer):
    tokenizer.chat_template = "{% if add_generation_prompt %}go{% else %}{{ messages[-1].content }}{% endif %}"
    with pytest.raises(ValueError, match="data.template: expected a chat template whose prompt is the beginning"):
        template(tokenizer, template="chat").response(ROW)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="data.template: expected a tokenizer with a chat template"):
        template(tokenizer, template="chat")


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_the_response_alone_is_learnt(tokenizer, name):
    made = template(tokenizer, template=name)
    table = Table("t", [ROW, {"prompt": "1 + 1 + 1", "response": "3"}], {})
    examples = encode(table, made, 32)
    for row, example in zip(table.rows, examples, strict=True):
        prompt = made.encode_prompt(made.prompt(row))
        # The tokens that generation starts from are those that training masks.
        assert example["input_ids"][: len(prompt)] == prompt
        assert example["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        assert example["labels"][len(prompt) :] == example["input_ids"][len(prompt) :]
    batch = Pad(0)(examples)
    longest = max(len(example["input_ids"]) for example in examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, longest)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_long_rows(tokenizer):
    rows = [ROW, {**ROW, "prompt": "1 + 1 + 1 + 1 + 1"}, {**ROW, "response": "1 2 3 4 5 6 7 8 9"}]
    with pytest.warns(UserWarning, match="of 3 rows, 1 are left out .* 2 responses are cut"):
        examples = encode(Table("t", rows, {}), template(tokenizer, template="plain"), 9)
    assert [len(example["input_ids"]) for example in examples] == [9, 9]
    with pytest.raises(ValueError, match="data.max_length: expected more than 3 tokens"):
        encode(Table("t", rows, {}), template(tokenizer, template="plain"), 3)


def test_no_dev_when_none_is_wanted(sum_run):
    run = make_run(sum_run, {"data.dev_size": 0})
    assert read_splits(run.data)[1] is None and run.best() is None
    result = train(make_run(sum_run, {"data.dev_size": 0, "training.max_steps": 2}))
    assert result["dev"] == {} and result["best_step"] == result["steps"] == 2


@pytest.fixture
def writer(llama) -> Writer:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    return Writer(model, template(tokenizer, template="plain"), GenerationSettings(max_new_tokens=5, batch=3))


def test_a_batch_answers_as_every_row_alone(writer):
    rows = [{"prompt": "the film"}, {"prompt": "1 + 2 = 3 and the"}, {"prompt": "good"}]
    assert len({len(row["prompt"].split()) for row in rows}) == 3
    texts = writer.answer(rows)
    assert texts == [writer.answer([row])[0] for row in rows]
    row = max(range(3), key=lambda i: len(texts[i].split()))
    word = texts[row].split()[-1]
    stopped = Writer(writer.model, writer.template, dataclasses.replace(writer.settings, stop=["zebra", word]))
    assert stopped.answer([rows[row]]) == [texts[row].partition(word)[0]]


class Broken(Exception):
    """Stands for a kill."""


def test_an_interrupted_evaluation_goes_on(writer, tmp_path, monkeypatch):
    rows = [({"prompt": row["prompt"]}, row["answer"]) for row in sums(8)]
    whole = answer_all(writer, rows, AnswersFile(tmp_path / "whole.jsonl", {"a": 1}))
    calls = []

    def answer(self, batch):
        if len(calls) == 2:
            raise Broken
        calls.append(len(batch))
        return right(self, batch)

    right = Writer.answer
    path = tmp_path / "killed.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "answer", answer)
        with pytest.raises(Broken):
            answer_all(writer, rows, AnswersFile(path, {"a": 1}))
    assert calls == [3, 3]
    # A kill in the middle of a line.
    path.write_bytes(path.read_bytes()[:-9])
    file = AnswersFile(path, {"a": 1})
    assert sorted(file.rows) == [0, 1, 2, 3, 4]
    again = answer_all(writer, rows, file)
    assert again == whole and again["rows"] == 8
    first, second = (sorted(p.read_text().splitlines()) for p in (tmp_path / "whole.jsonl", path))
    assert first == second
    # Nothing is left to do.
    monkeypatch.setattr(Writer, "answer", lambda *_: pytest.fail("answered again"))
    assert answer_all(writer, rows, AnswersFile(path, {"a": 1})) == whole


def test_an_unreadable_reference_is_found_first(writer, tmp_path):
    rows = [({"prompt": "1 + 1"}, "2"), ({"prompt": "1 + 2"}, "three")]
    file = AnswersFile(tmp_path / "answers.jsonl", {})
    with pytest.raises(ValueError, match=r"data\.test, row 1: reference: expected a number"):
        answer_all(writer, rows, file)
    assert file.rows == {}


def test_answers_of_something_else_are_not_mixed_in(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswersFile(path, {"adapter": "x"}).add([{"row": 0, "answer": None, "correct": False}])
    with pytest.raises(ValueError, match="expected answers made with {'adapter': 'y'}, got {'adapter': 'x'}"):
        AnswersFile(path, {"adapter": "y"})
    path.write_text(path.read_text() + '{"row": 1}\n')
    with pytest.raises(ValueError, match="line 3: expected a JSON object with answer, correct, row"):
        AnswersFile(path, {"adapter": "x"})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_then_evaluate(sum_run, checkpointing):
    run = make_run(sum_run, {"training.epochs": 6, "model.gradient_checkpointing": checkpointing})
    before = evaluate(run, base=True)
    result = train(run)
    assert result["loss"]["last"] < 0.8 * result["loss"]["first"]
    assert result["chosen_by"] == "loss" and result["parameters"]["head"] == 0
    after = evaluate(run)
    assert before["rows"] == after["rows"] == 7
    assert before["answers"] != after["answers"]
    lines = [json.loads(line) for line in Path(after["answers"]).read_text().splitlines()]
    assert lines[0]["made with"]["adapter"] is not None
    assert [line["expected"] for line in lines[1:]] == [row["answer"] for row in sums(7, seed=1)]
    base_lines = Path(before["answers"]).read_text().splitlines()
    assert [json.loads(line)["text"] for line in base_lines[1:]] != [line["text"] for line in lines[1:]]


def test_chat_run(sum_run, tmp_path):
    run = make_run(sum_run, {"data.template": "chat", "model.name": save_llama(tmp_path / "c", chat=True)})
    run.training.max_steps = 2
    assert train(run)["steps"] == 2


def test_bfloat16(sum_run):
    run = make_run(sum_run, {"model.dtype": "bfloat16", "training.bf16": True, "training.max_steps": 2})
    train(run)
    assert evaluate(run)["rows"] == 7
    assert torch.isfinite(torch.tensor(evaluate(run)["exact_match"]))
