"""One cell of the table: tune a method on a task's dev rows, train more seeds, and read the test rows once."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from examples.demo import fetch
from examples.demo.data import load_tasks
from examples.demo.model import TextClassifier, load_encoder, load_tokenizer
from examples.demo.train import correct, predict, tokenise_task, train_baseline

from .methods import METHODS, Method
from .results import Content, Results
from .training import Protocol, train

# Decays of the converged head: as many settings as every method has learning rates.
DECAYS = (1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Data:
    """A task, tokenised, and the frozen model that all methods start from."""

    name: str
    parts: dict[str, list[dict]]
    majority: float
    base: Callable[[], nn.Module]
    width: int


@cache
def load_data(protocol: Protocol) -> dict[str, Data]:
    """The demo's three tasks with the rows of a protocol, and its encoder; fetched where they are not yet."""
    tasks = load_tasks(fetch.fetch(fetch.SENTENCES), (protocol.train, protocol.dev, protocol.test))
    tokenizer = load_tokenizer(fetch.fetch(fetch.ENCODER))
    width = max(len(task.classes) for task in tasks)
    base = partial(frozen_model, width)
    return {t.name: Data(t.name, tokenise_task(tokenizer, t), t.majority, base, width) for t in tasks}


def frozen_model(width: int) -> nn.Module:
    """The demo's encoder under an untrained head of `width` classes."""
    return TextClassifier(load_encoder(fetch.fetch(fetch.ENCODER)), width)


def orient(data: Data, results: Results) -> None:
    """Note what needs no adapter: the most frequent class, and a head trained to convergence on the frozen encoder."""
    if data.name not in results.read()["tasks"]:
        torch.manual_seed(0)
        head = train_baseline(data.base(), data.parts, data.width, DECAYS)
        converged = {"accuracy": head.correct.double().mean().item(), "decay": head.decay}
        sizes = {part: len(rows) for part, rows in data.parts.items()}
        results.note("tasks", data.name, {"rows": sizes, "majority": data.majority, "converged_head": converged})


def run_cell(
    data: Data, method: Method, seeds: Sequence[int], protocol: Protocol, results: Results, work: Path
) -> None:
    """All runs of a method on a task that are not done yet.

    The first seed is trained with every learning rate, the one with the best dev accuracy (the smaller one of equals)
    with the other seeds; only these are scored on the test rows, from their files, on a fresh model.
    """
    for rate in method.rates:
        _train_once(data, method, rate, seeds[0], protocol, results, work)
    best = best_rate(results.rows(task=data.name, method=method.name, seed=seeds[0]), method.rates)
    for seed in seeds:
        row = _train_once(data, method, best, seed, protocol, results, work)
        if "test_accuracy" not in row:
            _score(row, data, method, results, work)


def run_named(task: str, method: str, seeds: Sequence[int], protocol: Protocol, path: Path, work: Path) -> None:
    """`run_cell` for a process of its own, which gets names instead of what they stand for."""
    quieten()
    run_cell(load_data(protocol)[task], METHODS[method], seeds, protocol, Results(path, protocol), work)


def quieten() -> None:
    """No reports of loading: the same encoder is loaded for every run."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def best_rate(rows: Sequence[Content], rates: Sequence[float]) -> float:
    """The learning rate with the best dev accuracy, the smaller one of equals; diverged runs come last."""
    tried = [row for row in rows if row["rate"] in rates]
    return min(tried, key=lambda row: (not math.isfinite(row["loss"]), -row["dev_accuracy"], row["rate"]))["rate"]


def _train_once(
    data: Data, method: Method, rate: float, seed: int, protocol: Protocol, results: Results, work: Path
) -> Content:
    """The row of a run; it is trained unless it is noted and, as long as it is not scored, its file is there."""
    found = results.rows(task=data.name, method=method.name, rate=rate, seed=seed)
    folder = _folder(work, data, method, rate, seed)
    if found and ("test_accuracy" in found[0] or folder.is_dir()):
        return found[0]
    model = method.build(data.base(), seed)
    torch.manual_seed(seed)
    start = time.perf_counter()
    label = f"{data.name}, {method.name}, rate {rate:g}, seed {seed}"
    loss = train(model, method, data.parts["train"], protocol, rate, seed, label)
    seconds = time.perf_counter() - start
    accuracy = _accuracy(predict(model, data.parts["dev"]), data.parts["dev"])
    _save(model, folder)
    row = {"task": data.name, "method": method.name, "rate": rate, "seed": seed, "loss": loss}
    row |= {"dev_accuracy": accuracy, "train_seconds": round(seconds, 1)}
    results.put(row)
    print(f"{label}: dev {accuracy:.1%}, loss {loss:.3f}, {seconds:.0f} s", flush=True)
    return row


def _score(row: Content, data: Data, method: Method, results: Results, work: Path) -> None:
    """Load a trained run onto a fresh model, check that it is the same one, and read the test rows."""
    model = method.reload(data.base(), _folder(work, data, method, row["rate"], row["seed"]))
    dev = _accuracy(predict(model, data.parts["dev"]), data.parts["dev"])
    if abs(dev - row["dev_accuracy"]) > 0.5 / len(data.parts["dev"]):
        raise RuntimeError(f"{method.name}, {data.name}: dev accuracy {row['dev_accuracy']} became {dev} after loading")
    right = correct(predict(model, data.parts["test"]), data.parts["test"])
    accuracy = right.double().mean().item()
    results.put({**row, "test_accuracy": accuracy, "test_right": pack(right)})
    print(f"  scored: {data.name}, {method.name}, seed {row['seed']}: test {accuracy:.1%}", flush=True)


def pack(right: Tensor) -> str:
    """bool [rows] as a string of 0 and 1, so that rows can be paired between methods."""
    return "".join("01"[value] for value in right.int().tolist())


def _accuracy(logits: Tensor, rows: list[dict]) -> float:
    return correct(logits, rows).double().mean().item()


def _folder(work: Path, data: Data, method: Method, rate: float, seed: int) -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in method.name.lower())
    return work / data.name / slug / f"rate-{rate:g}-seed-{seed}"


def _save(model: nn.Module, folder: Path) -> None:
    """The folder is complete whenever it exists."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        model.save_pretrained(str(Path(scratch) / "adapter"))
        os.replace(Path(scratch) / "adapter", folder)
