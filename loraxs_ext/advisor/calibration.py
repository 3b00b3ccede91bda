"""Calibration data: rows of a text file, a model of a folder, and the batches of one for the other."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from loraxs_ext.files import parse_object

from .gradients import Batch, Loss, model_loss

Task = Literal["causal", "classification"]
# A line longer than this is no row of text.
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Texts:
    """A sample of a file.

    Attributes:
        texts: the sampled ones, in the order of the file.
        labels: of the sampled texts, as written; empty without labels.
        classes: all labels of the whole file, sorted (as numbers where all of them are).
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def read_texts(path: Path, rows: int, *, text: str = "text", label: str | None = None, seed: int = 0) -> Texts:
    """At most `rows` rows of a .txt, .csv or .jsonl file, drawn evenly from all of it in one pass.

    Args:
        path: .txt with one text a line; .csv with a header; .jsonl with one object a line. UTF-8; empty texts are left
            out.
        rows: how many to draw; the same ones for the same file and seed.
        text: column or key of the text.
        label: column or key of the class, None for none; a .txt file has none.
        seed: of the draw.

    Raises:
        ValueError: the file is of another kind, holds something else, or no rows; says where.
    """
    kinds = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl}
    if path.suffix not in kinds:
        raise ValueError(f"data: expected a .txt, .csv or .jsonl file, got {path.name!r}")
    if path.suffix == ".txt" and label is not None:
        raise ValueError(f"data: expected a .csv or .jsonl file, which can hold labels, got {path.name!r}")
    draw = random.Random(seed)
    sample: list[tuple[int, str, str]] = []
    classes: set[str] = set()
    count = 0
    for where, row in kinds[path.suffix](path):
        values = [_value(row, name, where) for name in (text, label) if name is not None]
        if not values[0].strip():
            continue
        found = (count, values[0], values[-1])
        classes.add(values[-1])
        # Reservoir sampling: every row of a file of unknown length is equally likely to stay.
        place = count if count < rows else draw.randint(0, count)
        if place < rows:
            sample[place : place + 1] = [found]
        count += 1
    if not sample:
        raise ValueError(f"data: expected rows with text, got none in {path}")
    _, texts, labels = zip(*sorted(sample), strict=True)
    return Texts(texts) if label is None else Texts(texts, labels, tuple(sorted(classes, key=_as_number)))


def _value(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{where}: expected a string or whole number under {name!r}, got {value!r} among {list(row)}")
    return str(value)


def _as_number(label: str) -> tuple[bool, int, str]:
    return (False, int(label), label) if label.isdecimal() else (True, 0, label)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line as a row under the name "text"."""
    for where, line in _numbered(path):
        yield where, {"text": line}


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _numbered(path):
        if line.strip():
            yield where, parse_object(line, where)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as reason:
            raise ValueError(f"{path}, line {reader.line_num}: expected UTF-8 text in CSV, got {reason}") from None


def _numbered(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        number = 0
        try:
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise ValueError(f"{path}, line {number}: expected a line below {_LONGEST_LINE} characters")
                yield f"{path}, line {number}", line.rstrip("\n")
        except UnicodeDecodeError as reason:
            raise ValueError(f"{path}, after line {number}: expected UTF-8 text, got {reason}") from None


@dataclass(frozen=True)
class Subject:
    """A model ready to be measured.

    Attributes:
        model: with the weights of its folder.
        batches: of the calibration rows.
        new: parameters that the folder does not hold, such as the head of a classifier; see `fit_head`.
    """

    model: nn.Module
    batches: Sequence[Batch]
    new: list[nn.Parameter]


def load(
    folder: Path,
    task: Task,
    data: Texts,
    *,
    batch: int = 8,
    max_tokens: int = 128,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Subject:
    """The model of a transformers folder, and the calibration rows as its batches.

    Nothing is downloaded, and no code of the folder is run.

    Args:
        folder: with config.json, safetensors and a tokeniser.
        task: "causal" predicts every next token, "classification" the label of a row. A classifier is given a new head
            if the data has another number of classes than its own.
        data: calibration rows.
        batch: rows a batch.
        max_tokens: longer rows are cut.
        device: of model and batches.
        seed: of a new head.

    Raises:
        ValueError: the folder is not that of a model, or the data does not fit the task.
        OSError: transformers cannot read the folder.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL: expected a folder of a transformers model, got {folder} without config.json")
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    kind: Any = AutoModelForCausalLM
    if task == "classification":
        if len(data.classes) < 2:
            raise ValueError(f"data: expected labels of at least 2 classes, got {list(data.classes)}")
        kind = AutoModelForSequenceClassification
        options |= {"num_labels": len(data.classes), "ignore_mismatched_sizes": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, report = kind.from_pretrained(folder, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    new = [parameter for name, parameter in model.named_parameters() if name in missing]
    labels = None
    if task == "classification":
        numbers = _class_numbers(model, data.classes, fresh=bool(new))
        labels = [numbers[name] for name in data.labels]
    batches = batches_of(tokenizer, data.texts, labels, batch=batch, max_tokens=max_tokens)
    moved = [{name: part.to(device) for name, part in tensors.items()} for tensors in batches]
    return Subject(model.to(device), moved, new)


def _class_numbers(model: Any, classes: Sequence[str], *, fresh: bool) -> dict[str, int]:
    """Which output stands for which class: a trained head says so itself, by name or by number."""
    known = {str(name): int(number) for name, number in (model.config.label2id or {}).items()}
    if fresh:
        return {name: number for number, name in enumerate(classes)}
    if set(classes) <= set(known):
        return known
    if set(classes) <= {str(number) for number in range(model.config.num_labels)}:
        return {name: int(name) for name in classes}
    raise ValueError(f"data: expected labels of the model's classes {sorted(known)}, got {list(classes)}")


def batches_of(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[int] | None,
    *,
    batch: int = 8,
    max_tokens: int = 128,
) -> list[Batch]:
    """Token ids, masks and labels, padded batch by batch; without labels every next token is one."""
    made: list[Batch] = []
    for start in range(0, len(texts), batch):
        rows = slice(start, start + batch)
        tokens = tokenizer(list(texts[rows]), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        target = ids.masked_fill(mask == 0, -100) if labels is None else torch.tensor(labels[rows])
        made.append({"input_ids": ids, "attention_mask": mask, "labels": target})
    return made


def fit_head(
    model: nn.Module,
    batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter],
    *,
    epochs: int = 10,
    lr: float = 5e-3,
    loss: Loss = model_loss,
    progress: bool = True,
) -> None:
    """Train `parameters` alone on the batches, by AdamW: the gradient behind an untrained head says nothing of a task.

    Args:
        model: all of it but `parameters` stays as it is; in eval mode meanwhile.
        batches: calibration data.
        parameters: of the head; nothing happens without any.
        epochs: passes over the batches.
        lr: learning rate, falling linearly to 0.
        loss: (model, batch) -> scalar.
        progress: show a bar.
    """
    if not parameters:
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval().requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with torch.enable_grad(), tqdm(total=steps, desc="head", unit="batch", disable=not progress, leave=False) as bar:
        for step in range(steps):
            optimizer.zero_grad()
            loss(model, batches[step % len(batches)]).backward()
            optimizer.step()
            schedule.step()
            bar.update()
    optimizer.zero_grad()
    model.train(training).requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
