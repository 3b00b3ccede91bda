"""Three labelled text tasks made from the fetched sentences, with splits that keep one document on one side."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rows:
    """Texts and their class numbers, in step."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, count: int) -> Rows:
        """The first ``count`` rows."""
        return Rows(self.texts[:count], self.labels[:count])


@dataclass(frozen=True)
class Task:
    """A classification task. ``test`` is read once, at the end; ``dev`` is for curves and the baseline's decay."""

    name: str
    title: str
    classes: tuple[str, ...]
    train: Rows
    dev: Rows
    test: Rows

    @property
    def majority(self) -> float:
        """Test accuracy of always answering the most frequent training class."""
        top = max(range(len(self.classes)), key=self.train.labels.count)
        return self.test.labels.count(top) / len(self.test)


@dataclass(frozen=True)
class Sentence:
    """One rated sentence: the document it was cut from, its text, and its mean rating in [-4, 4]."""

    document: str
    text: str
    rating: float


@dataclass(frozen=True)
class Example:
    """One labelled text, and the document that keeps it on one side of the split."""

    document: str
    text: str
    label: int


SOURCES = {
    "tweet": "tweets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
    "editorial": "nytEditorialSnippets_GroundTruth.txt",
    "movie": "movieReviewSnippets_GroundTruth.txt",
}
POLARITY = ("negative", "positive")


def read_sentences(path: Path) -> list[Sentence]:
    """Parse a tab-separated file of ``id, mean rating, text``; ids read ``document_sentence`` or plain ``document``.

    Raises ValueError with the line number on anything else.
    """
    sentences = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(f"{path.name}, line {number}: expected 3 tab-separated fields, got {len(fields)}")
        identity, rating, text = fields
        try:
            value = float(rating)
        except ValueError:
            raise ValueError(f"{path.name}, line {number}: expected a number as rating, got {rating!r}") from None
        sentences.append(Sentence(identity.split("_")[0], text.strip(), value))
    return sentences


def sentiment(sentences: Sequence[Sentence], threshold: float = 0.5) -> list[Example]:
    """Label clear opinions by the sign of their rating; ratings below ``threshold`` in absolute value are left out."""
    clear = [s for s in sentences if abs(s.rating) >= threshold]
    return [Example(s.document, s.text, int(s.rating > 0)) for s in clear]


def source_of_text(by_source: dict[str, list[Sentence]], min_words: int = 4) -> list[Example]:
    """Label sentences by where they were published, lower-cased so that capitals alone don't tell."""
    return [
        Example(f"{source}/{s.document}", s.text.lower(), label)
        for label, source in enumerate(by_source)
        for s in by_source[source]
        if len(s.text.split()) >= min_words
    ]


def split(examples: Sequence[Example], sizes: tuple[int, int, int], seed: int = 0) -> tuple[Rows, Rows, Rows]:
    """Cut ``examples`` into (train, dev, test) of at most ``sizes`` rows, no document and no text on two sides.

    Texts that occur twice are kept once; documents are shuffled with ``seed``, then fill test, dev and train in turn,
    and each part is shuffled so that its first rows are a fair sample.
    """
    seen: set[str] = set()
    documents: dict[str, list[Example]] = {}
    for example in examples:
        key = example.text.lower()
        if key not in seen:
            seen.add(key)
            documents.setdefault(example.document, []).append(example)
    shuffler = random.Random(seed)
    order = list(documents)
    shuffler.shuffle(order)
    parts: list[list[Example]] = []
    position = 0
    for size in reversed(sizes):
        part: list[Example] = []
        while position < len(order) and len(part) < size:
            part.extend(documents[order[position]])
            position += 1
        shuffler.shuffle(part)
        parts.append(part[:size])
    test, dev, train = (Rows(tuple(e.text for e in part), tuple(e.label for e in part)) for part in parts)
    return train, dev, test


def load_tasks(folder: Path, sizes: tuple[int, int, int]) -> list[Task]:
    """Build the demo's three tasks from the fetched files, with at most ``sizes`` = (train, dev, test) rows each."""
    by_source = {source: read_sentences(folder / file) for source, file in SOURCES.items()}
    recipes: list[tuple[str, str, tuple[str, ...], Callable[[], list[Example]]]] = [
        ("movie", "Movie sentiment", POLARITY, lambda: sentiment(by_source["movie"])),
        ("product", "Product sentiment", POLARITY, lambda: sentiment(by_source["product"])),
        ("source", "Source of text", tuple(by_source), lambda: source_of_text(by_source)),
    ]
    return [Task(name, title, classes, *split(make(), sizes)) for name, title, classes, make in recipes]
