"""Classification and regression on texts, as in GLUE: rows to tokens, and logits to metrics and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .metrics import classification_metrics, regression_metrics
from .settings import ClassificationData
from .tables import Row, Table, read_table, split_off

Example = dict[str, Any]


@dataclass(frozen=True)
class Labels:
    """What the logits stand for: class names, or None for a regression."""

    names: list[str] | None

    @classmethod
    def of(cls, data: ClassificationData, train: Table) -> Labels:
        """Those of the settings, of the `datasets` folder, or of train in this order.

        Raises:
            ValueError: train has fewer than two.
        """
        if data.regression:
            return cls(None)
        names = data.labels or train.class_names.get(data.label)
        if names is None:
            found = {_name(row[data.label]) for row in train.rows}
            whole = all(name.lstrip("-").isdigit() for name in found)
            names = sorted(found, key=lambda name: (int(name) if whole else 0, name))
        if len(names) < 2:
            raise ValueError(f"data.label: expected at least two classes in {train.path}, got {names}")
        return cls(names)

    def number(self, value: Any, table: Table, column: str) -> float | int:
        """The label as a class number, or as the value of a regression.

        Raises:
            ValueError: it is neither the name of a class nor a number.
        """
        if self.names is None:
            try:
                return float(value)
            except (TypeError, ValueError):
                raise ValueError(f"{table.path}: {column}: expected a number, got {value!r}") from None
        # A `datasets` folder stores numbers where its feature has the names.
        stored = table.class_names.get(column)
        name = stored[value] if stored and isinstance(value, int) and 0 <= value < len(stored) else _name(value)
        if name not in self.names:
            raise ValueError(f"{table.path}: {column}: expected one of {', '.join(self.names)}, got {name!r}")
        return self.names.index(name)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """GLUE's metrics of logits [rows, classes] or values [rows, 1]."""
        if self.names is None:
            return regression_metrics(logits.reshape(-1), labels)
        return classification_metrics(logits.argmax(-1), labels, len(self.names))

    def prediction(self, logits: np.ndarray) -> dict[str, Any]:
        """What is written about one row, from logits [classes]."""
        if self.names is None:
            return {"prediction": float(logits.reshape(-1)[0])}
        odds = np.exp(logits - logits.max())
        probability = odds / odds.sum()
        return {"prediction": self.names[int(logits.argmax())], "probability": float(probability.max())}


def read_splits(data: ClassificationData) -> tuple[Table, Table, Labels]:
    """(train, dev, labels); dev cut off from train where none is given."""
    train = read_table(data.train, [*data.text, data.label], limit=data.max_train_rows)
    labels = Labels.of(data, train)
    if data.dev is not None:
        return train, read_table(data.dev, [*data.text, data.label]), labels
    kept, off = split_off(train.rows, data.dev_size, data.text)
    return Table(train.path, kept, train.class_names), Table(train.path, off, train.class_names), labels


def read_test(data: ClassificationData) -> tuple[Table, bool]:
    """The test rows, and whether they are labelled; a `datasets` folder of GLUE hides its labels behind -1.

    Raises:
        ValueError: there is no test file, or only some of its rows have labels.
    """
    if data.test is None:
        raise ValueError("data.test: expected a file, got null")
    table = read_table(data.test, data.text, [data.label])
    if data.label in table.class_names:
        for row in table.rows:
            if row.get(data.label) == -1:
                del row[data.label]
    labelled = sum(data.label in row for row in table.rows)
    if labelled not in (0, len(table)):
        raise ValueError(f"{data.test}: expected labels in all rows or in none, got {labelled} of {len(table)}")
    return table, labelled > 0


def encode(
    table: Table, data: ClassificationData, labels: Labels, tokenizer: PreTrainedTokenizerBase, labelled: bool = True
) -> list[Example]:
    """Token ids of every row, unpadded, with its label."""
    texts = [[_text(row, column) for row in table.rows] for column in data.text]
    encoded = tokenizer(*texts, truncation=True, max_length=data.max_length)
    examples = [{name: encoded[name][i] for name in encoded} for i in range(len(table))]
    if labelled:
        for example, row in zip(examples, table.rows, strict=True):
            example["labels"] = labels.number(row[data.label], table, data.label)
    return examples


class Pad:
    """A collator that pads to the longest row of the batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: Sequence[Example]) -> Any:
        return self.tokenizer.pad(list(examples), return_tensors="pt")


def _text(row: Row, column: str) -> str:
    return str(row[column])


def _name(value: Any) -> str:
    """The name of a class; 1, 1.0 and "1" are one name."""
    return (
        str(int(value))
        if isinstance(value, (bool, int)) or isinstance(value, float) and value.is_integer()
        else str(value)
    )
