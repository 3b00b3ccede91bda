"""Training for the demo: a linear head on the frozen encoder, and adapters with the Hugging Face Trainer."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .data import Rows, Task
from .model import MAX_TOKENS, TextClassifier


@dataclass(frozen=True)
class Settings:
    """Training settings of one adapter; together with the data they decide whether a saved one can be reused."""

    method: str = "LoRA-XS"
    rank: int = 16
    epochs: int = 2
    batch: int = 32
    adapter_lr: float = 5e-3
    head_lr: float = 1e-2
    warmup: float = 0.06
    seed: int = 0


@dataclass(frozen=True)
class Curve:
    """A learning curve: training loss at every optimiser step, dev accuracy after every epoch."""

    loss: list[float]
    dev_accuracy: list[float]
    steps_per_epoch: int


def encode(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[dict]:
    """Tokenise ``rows`` into the examples that ``collate`` pads batch by batch."""
    ids = tokenizer(list(rows.texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [{"input_ids": tokens, "labels": label} for tokens, label in zip(ids, rows.labels, strict=True)]


def collate(examples: Sequence[dict]) -> dict[str, Tensor]:
    """Pad examples to the longest one: input_ids and attention_mask int64 [rows, tokens], labels int64 [rows]."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def by_length(examples: Sequence[dict], batch: int) -> list[list[int]]:
    """Batches of row numbers, rows of like length together, so that little is spent on padding."""
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]))
    return [order[start : start + batch] for start in range(0, len(order), batch)]


class LengthBatches:
    """A batch sampler for training: random order, rows of like length together; a new shuffle every epoch."""

    def __init__(self, examples: Sequence[dict], batch: int, seed: int) -> None:
        self.examples, self.batch = examples, batch
        self.random = random.Random(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.examples) / self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        # A little noise on the length keeps the same rows from always meeting in one batch.
        noisy = [len(example["input_ids"]) * self.random.uniform(0.8, 1.25) for example in self.examples]
        order = sorted(range(len(noisy)), key=noisy.__getitem__)
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        self.random.shuffle(batches)
        return iter(batches)


@torch.inference_mode()
def predict(model: nn.Module, examples: Sequence[dict], output: str = "logits", label: str | None = None) -> Tensor:
    """Run ``model`` over ``examples`` and return ``output`` [rows, width] in their order; ``label`` names a bar."""
    model.eval()
    result: list[Tensor] = [torch.empty(0)] * len(examples)
    for rows in tqdm(by_length(examples, 64), desc=label, disable=None if label else True, leave=False, unit="batch"):
        batch = collate([examples[row] for row in rows])
        values = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[output]
        for row, value in zip(rows, values, strict=True):
            result[row] = value
    return torch.stack(result)


def labels_of(examples: Sequence[dict]) -> Tensor:
    """Labels int64 [rows] of tokenised examples."""
    return torch.tensor([example["labels"] for example in examples])


def correct(logits: Tensor, examples: Sequence[dict]) -> Tensor:
    """bool [rows]: whether the largest logit is the labelled class."""
    return logits.argmax(-1) == labels_of(examples)


@dataclass(frozen=True)
class Baseline:
    """The frozen encoder with a trained linear head: which test rows it gets right, its decay, and the time it took."""

    correct: Tensor
    decay: float
    seconds: float


def train_baseline(
    model: TextClassifier, parts: dict[str, list[dict]], width: int, decays: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0)
) -> Baseline:
    """Fit the best linear head on frozen embeddings: logistic regression to convergence, decay chosen on dev.

    It sees the same rows as the adapters and gets the one choice they do not get, so beating it means something.
    """
    start = time.perf_counter()
    features = {part: predict(model, rows, "embedding", f"  embedding {part}").clone() for part, rows in parts.items()}
    mean, std = features["train"].mean(0), features["train"].std(0)
    features = {part: (rows - mean) / std for part, rows in features.items()}
    best: tuple[float, float, nn.Linear] | None = None
    for decay in decays:
        head = _fit_linear(features["train"], labels_of(parts["train"]), width, decay)
        accuracy = correct(head(features["dev"]), parts["dev"]).double().mean().item()
        if best is None or accuracy > best[0]:
            best = (accuracy, decay, head)
    assert best is not None
    _, decay, head = best
    return Baseline(correct(head(features["test"]), parts["test"]), decay, time.perf_counter() - start)


def _fit_linear(features: Tensor, labels: Tensor, width: int, decay: float) -> nn.Linear:
    """Minimise mean cross-entropy + decay/2·‖W‖² over a linear layer, from zero, with L-BFGS."""
    head = nn.Linear(features.shape[1], width)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(features), labels) + decay / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.requires_grad_(False)


class _Watch(TrainerCallback):
    """One progress bar a task, and the numbers of the learning curve."""

    def __init__(self, model: nn.Module, dev: list[dict], label: str) -> None:
        self.model, self.dev, self.label = model, dev, label
        self.loss: list[float] = []
        self.dev_accuracy: list[float] = []
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.label, unit="step", leave=False, disable=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        assert self.bar is not None
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: object
    ) -> None:
        if "loss" in logs:
            self.loss.append(float(logs["loss"]))
            self._show()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        accuracy = correct(predict(self.model, self.dev), self.dev).double().mean().item()
        self.model.train()
        self.dev_accuracy.append(accuracy)
        self._show()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        assert self.bar is not None
        self.bar.close()

    def _show(self) -> None:
        assert self.bar is not None
        shown = {"loss": f"{sum(self.loss[-20:]) / max(1, len(self.loss[-20:])):.3f}"}
        if self.dev_accuracy:
            shown["dev accuracy"] = f"{self.dev_accuracy[-1]:.1%}"
        self.bar.set_postfix(shown, refresh=False)


class _LengthTrainer(Trainer):
    """The Trainer with batches of like length."""

    def get_train_dataloader(self) -> DataLoader:
        batches = LengthBatches(self.train_dataset, self.args.per_device_train_batch_size, self.args.seed)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


def train_adapter(
    model: nn.Module, parts: dict[str, list[dict]], settings: Settings, scratch: Path, label: str
) -> tuple[Curve, float]:
    """Train a PEFT model's adapter and head on ``parts["train"]``; return the learning curve and the seconds it took.

    ``parts["dev"]`` is only watched. ``scratch`` is a folder that the Trainer may write to.
    """
    head = [p for n, p in model.named_parameters() if p.requires_grad and ".head." in n]
    adapter = [p for n, p in model.named_parameters() if p.requires_grad and ".head." not in n]
    groups = [{"params": adapter, "lr": settings.adapter_lr}, {"params": head, "lr": settings.head_lr}]
    steps = math.ceil(len(parts["train"]) / settings.batch)
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        warmup_steps=round(settings.warmup * steps * settings.epochs),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        label_names=["labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        seed=settings.seed,
    )
    watch = _Watch(model, parts["dev"], label)
    trainer = _LengthTrainer(
        model=model,
        args=arguments,
        train_dataset=parts["train"],
        data_collator=collate,
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return Curve(watch.loss, watch.dev_accuracy, steps), time.perf_counter() - start


def tokenise_task(tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, list[dict]]:
    """Tokenised examples of a task by part: "train", "dev", "test"."""
    return {
        "train": encode(tokenizer, task.train),
        "dev": encode(tokenizer, task.dev),
        "test": encode(tokenizer, task.test),
    }
