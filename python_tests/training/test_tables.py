"""Rows from every format, and a split that is always the same."""

from __future__ import annotations

import json
import random

import pytest

from loraxs_ext.training.tables import content_digest, read_table, split_off

ROWS = [{"text": 'a "quoted", text', "label": "x"}, {"text": "später\tdann", "label": "y"}]


def test_formats_agree(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"a ""quoted"", text",x\nspäter\tdann,y\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "a"))
    for name in ("a.csv", "a.jsonl", "a.json", "a/train"):
        table = read_table(str(tmp_path / name), ["text", "label"])
        assert table.rows == ROWS, name
        assert read_table(str(tmp_path / name), ["text"], limit=1).rows == [{"text": ROWS[0]["text"]}]
    with pytest.raises(ValueError, match="expected one split, got the folder of several: train"):
        read_table(str(tmp_path / "a"), ["text"])
    with pytest.raises(ValueError, match="expected a column 'words'; there are text, label"):
        read_table(str(tmp_path / "a/train"), ["words"])


def test_tab_separated_files_quote_nothing(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"half a quote\t1\n')
    assert read_table(str(tmp_path / "a.tsv"), ["text", "label"]).rows == [{"text": '"half a quote', "label": "1"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,b\nc\n", "a.csv, line 3: expected 2 fields"),
        ("a.csv", "text,label\na,b,c\n", "a.csv, line 2: expected 2 fields"),
        ("a.csv", 'text,label\n"a,b\n', "a.csv, line 1: unexpected end"),
        ("a.csv", "text,label\n", "a.csv: expected at least one row"),
        ("a.csv", "words,label\na,b\n", "a.csv, line 2: expected a value for 'text'; there are words, label"),
        ("a.jsonl", '{"text": 1, "label": 2}\n[1]\n', "a.jsonl, line 2: expected a JSON object, got list"),
        ("a.jsonl", '{"text": \n', "a.jsonl, line 1: expected a JSON object"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "a.jsonl, line 1: expected a value for 'label'"),
        ("a.json", '{"text": 1}', "a.json: expected a JSON array"),
        ("a.txt", "text", "a.txt: expected a file ending in .csv"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        read_table(str(tmp_path / name), ["text", "label"])
    assert message in str(caught.value)
    with pytest.raises(FileNotFoundError, match="found nothing"):
        read_table(str(tmp_path / "none.csv"), ["text"])


def test_split_depends_on_the_texts_alone():
    rows = [{"text": f"text {i % 40}", "label": str(i)} for i in range(60)]
    train, dev = split_off(rows, 0.25, ["text"])
    assert len({row["text"] for row in dev}) == 10 and len(train) + len(dev) == 60
    assert not {row["text"] for row in dev} & {row["text"] for row in train}
    shuffled = random.Random(0).sample(rows, len(rows))
    again = split_off(shuffled, 10, ["text"])[1]
    assert sorted(row["label"] for row in again) == sorted(row["label"] for row in dev)


@pytest.mark.parametrize("size", [0.001, 40, 100])
def test_split_leaves_rows_on_both_sides(size):
    with pytest.raises(ValueError, match=r"data\.dev_size: expected to leave rows on both sides"):
        split_off([{"text": str(i)} for i in range(40)], size, ["text"])


def test_digest_follows_the_content(tmp_path):
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(content)
    a, b, c = (content_digest(str(tmp_path / name)) for name in "abc")
    assert a == b != c
