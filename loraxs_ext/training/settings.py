"""What a training run is told: one dataclass per section of its YAML file, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from loraxs_ext.peft import LoraXSConfig

from .answers import Grader
from .fields import build, check_names, convert, flatten, merge, nest, setting
from .presets import PRESETS

# Fields of the adapter's configuration that the run itself fills in.
_OWN_FIELDS = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path", "auto_mapping", "peft_version")
ADAPTER_FIELDS = tuple(f.name for f in dataclasses.fields(LoraXSConfig) if f.name not in _OWN_FIELDS)


@dataclass
class ModelSettings:
    """The frozen model."""

    name: str = setting("", "folder of a transformers model, or its name on the hub; required")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "float32", "precision of the frozen weights; auto: as stored. R is always trained in float32"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: slower, less memory")


@dataclass
class ClassificationData:
    """Texts and labels."""

    train: str = setting("", ".csv, .tsv or .jsonl file, or a `datasets` folder of one split; required")
    dev: str | None = setting(None, "the same, to choose the best checkpoint; null: cut off from train")
    test: str | None = setting(None, "the same, for `loraxs eval`; labels may be absent")
    dev_size: float = setting(0.1, "without dev: a share of train's different texts below 1, else how many of them")
    text: list[str] = setting(["sentence"], "one or two text columns")
    label: str = setting("label", "label column: names, or whole numbers; for regression, numbers")
    labels: list[str] | None = setting(None, "class names in the order of the logits; null: those of train, sorted")
    regression: bool = setting(False, "predict a number, as STS-B does")
    max_length: int = setting(128, "tokens; longer rows are cut")
    max_train_rows: int | None = setting(None, "read that many rows of train")


@dataclass
class InstructionData:
    """Prompts and responses."""

    train: str = setting("", ".jsonl, .csv or .tsv file, or a `datasets` folder of one split; required")
    dev: str | None = setting(None, "the same, for the loss that chooses the best checkpoint; null: cut off from train")
    test: str | None = setting(None, "the same, whose prompts `loraxs eval` answers")
    dev_size: float = setting(0.05, "without dev: a share of train's different texts below 1, else how many; 0: none")
    prompt: str = setting("prompt", "column of the prompt")
    input: str | None = setting(None, "column of further input; it may be absent or empty in a row")
    response: str = setting("response", "column of the response, which alone is learnt")
    answer: str | None = setting(None, "column of the reference answer in test; null: the response")
    template: str = setting(
        "alpaca", "alpaca; chat, the tokenizer's own; plain; or a text with {prompt} and, if need be, {input}"
    )
    max_length: int = setting(512, "tokens of prompt and response; longer responses are cut")
    max_train_rows: int | None = setting(None, "read that many rows of train")


@dataclass
class TrainingSettings:
    """Optimisation: AdamW with a group for the adapter and one for the head."""

    lr: float = setting(4e-3, "learning rate of the adapter")
    head_lr: float | None = setting(None, "learning rate of the head, which is trained completely; null: lr")
    epochs: float = setting(3.0, "passes over train")
    max_steps: int | None = setting(None, "stop after so many optimiser steps, whatever epochs says")
    batch: int = setting(32, "rows per step and device")
    accumulate: int = setting(1, "batches per optimiser step")
    eval_batch: int = setting(64, "rows per batch of evaluation")
    warmup: float = setting(0.06, "share of the steps below 1, else how many, in which the rates rise from 0")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", "how the rates fall after that"
    )
    weight_decay: float = setting(0.0, "of AdamW")
    max_grad_norm: float = setting(1.0, "gradients are clipped to that norm")
    bf16: bool = setting(False, "autocast to bfloat16")
    checkpoint_steps: int | None = setting(None, "evaluate and save every so many steps; null: every epoch")
    best: str | None = setting(
        None, "metric on dev that chooses the checkpoint; null: accuracy, correlation or loss, as the task is"
    )
    log_steps: int = setting(10, "steps between points of the loss curve")
    seed: int = setting(0, "of the head, the order of rows and dropout; R has adapter.init_seed")
    cpu: bool = setting(False, "train on the CPU although there is an accelerator")


@dataclass
class GenerationSettings:
    """How `loraxs eval` makes and checks answers."""

    grader: Grader = setting(
        "number", "number: behind 'The answer is' or '####'; last_number: also unmarked; choice: one option; exact"
    )
    max_new_tokens: int = setting(256, "of an answer")
    batch: int = setting(8, "prompts generated together, padded on the left")
    beams: int = setting(1, "1: greedy")
    prompt_suffix: str = setting("", "appended to every prompt, the beginning of the answer")
    stop: list[str] = setting([], "texts that end an answer")
    limit: int | None = setting(None, "answer only so many rows of test")


@dataclass
class Run:
    """What both tasks have in common."""

    task: Literal["classification", "instruction"] = setting("classification", "classification or instruction")
    preset: str | None = setting(None, "values to start from; everything below overrides them")
    output: str = setting("", "folder of the run; the same command goes on in it after an interruption; required")
    start_from: str | None = setting(
        None,
        "folder of a trained adapter to go on from, as the paper goes on from MNLI: its R, and what fits of its head",
    )
    keep_head: Literal["matching", "all", "none"] = setting(
        "matching", "with start_from: tensors of the head whose shapes fit; all, or it is an error; none"
    )
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    adapter: dict[str, Any] = setting({}, "any field of LoraXSConfig")
    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)

    def adapter_config(self) -> LoraXSConfig:
        """The configuration of the adapter; ValueError names the field that does not fit."""
        check_names(self.adapter, ADAPTER_FIELDS, "adapter")
        defaults = {field.name: field.default for field in dataclasses.fields(LoraXSConfig)}
        values = {
            name: convert(value, float, f"adapter.{name}") if type(defaults[name]) is float else value
            for name, value in self.adapter.items()
        }
        values.setdefault("target_modules", "all-linear")
        kind = "SEQ_CLS" if self.task == "classification" else "CAUSAL_LM"
        try:
            return LoraXSConfig(**values, task_type=kind)
        except (TypeError, ValueError) as error:
            raise ValueError(f"adapter.{error}") from error

    def check(self) -> None:
        """Raise ValueError at the first field that is out of range."""
        data, training = cast(Any, self).data, self.training
        required = {"output": self.output, "model.name": self.model.name, "data.train": data.train}
        for name, value in required.items():
            _expect(bool(value), name, "a value", value)
        if self.preset == "glue-from-mnli":
            _expect(bool(self.start_from), "start_from", "the folder of an adapter trained on MNLI", self.start_from)
        positive: dict[str, float | None] = {
            "training.lr": training.lr,
            "training.epochs": training.epochs,
            "training.batch": training.batch,
        }
        positive |= {"training.accumulate": training.accumulate, "training.eval_batch": training.eval_batch}
        positive |= {"training.log_steps": training.log_steps, "data.max_length": data.max_length}
        positive |= {"data.max_train_rows": data.max_train_rows, "training.max_steps": training.max_steps}
        positive |= {"training.checkpoint_steps": training.checkpoint_steps, "training.head_lr": training.head_lr}
        for name, number in positive.items():
            _expect(number is None or number > 0, name, "a positive number", number)
        for name in ("warmup", "weight_decay", "max_grad_norm", "seed"):
            number = getattr(training, name)
            _expect(number >= 0, f"training.{name}", "a number of at least 0", number)
        _expect(data.dev_size >= 0, "data.dev_size", "a number of at least 0", data.dev_size)
        best, metrics = training.best, self.metrics()
        _expect(best is None or best in metrics, "training.best", f"one of {', '.join(metrics)}", best)
        self.adapter_config()

    def metrics(self) -> tuple[str, ...]:
        """Metrics on dev that can choose a checkpoint; the first does unless `training.best` names another."""
        raise NotImplementedError

    def best(self) -> str | None:
        """The metric that chooses a checkpoint; None without dev."""
        data = cast(Any, self).data
        return (self.training.best or self.metrics()[0]) if data.dev is not None or data.dev_size else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, nested as the YAML file is."""
        return dataclasses.asdict(self)


@dataclass
class ClassificationRun(Run):
    """Fine-tune a classifier, or a regression, on labelled texts."""

    data: ClassificationData = dataclasses.field(default_factory=ClassificationData)

    def metrics(self) -> tuple[str, ...]:
        regression = ("correlation", "pearson", "spearman", "loss")
        return regression if self.data.regression else ("accuracy", "f1", "matthews", "loss")

    def check(self) -> None:
        super().check()
        _expect(len(self.data.text) in (1, 2), "data.text", "one or two columns", self.data.text)
        _expect(
            self.data.dev is not None or self.data.dev_size > 0,
            "data.dev_size",
            "a positive number",
            self.data.dev_size,
        )
        _expect(
            self.data.labels is None or len(set(self.data.labels)) == len(self.data.labels) > 1,
            "data.labels", "two or more different names", self.data.labels,
        )  # fmt: skip


@dataclass
class InstructionRun(Run):
    """Fine-tune a causal language model on prompts and responses."""

    data: InstructionData = dataclasses.field(default_factory=InstructionData)
    generation: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)

    def metrics(self) -> tuple[str, ...]:
        return ("loss",)

    def check(self) -> None:
        super().check()
        template = self.data.template
        known = template in ("alpaca", "chat", "plain") or "{prompt}" in template
        _expect(known, "data.template", "'alpaca', 'chat', 'plain' or a text with {prompt}", template)
        _expect(self.start_from is None or self.keep_head == "matching", "keep_head", "'matching'", self.keep_head)
        for name in ("max_new_tokens", "batch", "beams", "limit"):
            number = getattr(self.generation, name)
            _expect(number is None or number > 0, f"generation.{name}", "a positive number", number)


TASKS: dict[str, type[Run]] = {"classification": ClassificationRun, "instruction": InstructionRun}


def make_run(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Run:
    """A checked run: the preset's values, `values` over them, `overrides` ("training.lr": 1e-3) over all.

    Raises:
        ValueError: names the field, what was expected and what came.
    """
    given = merge(values, nest(overrides or {}))
    name = given.get("preset")
    if name is not None:
        check_names([name], PRESETS, "preset")
        given = merge(nest({path: choice.value for path, choice in PRESETS[name].choices.items()}), given)
    task = given.get("task", "classification")
    check_names([task], TASKS, "task")
    run = build(TASKS[task], given)
    run.check()
    return run


def read_run(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Run:
    """`make_run` of a YAML file; paths in it are relative to the working directory."""
    return make_run(read_yaml(path), overrides)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ImportError: PyYAML is missing.
        ValueError: the file is no YAML mapping, or a key stands in it twice.
    """
    yaml = import_yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := {str(key) for key in keys if keys.count(key) > 1}:
                raise ValueError(f"{path}{node.start_mark}: {', '.join(sorted(twice))} stands there twice")
            return super().construct_mapping(node, deep)

    try:
        with open(path, encoding="utf-8") as stream:
            values = yaml.load(stream, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected fields and values, got {values!r}")
    return values


def import_yaml() -> Any:
    """PyYAML, or the error that says how to get it."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError('reading YAML needs pyyaml: pip install "loraxs-ext[train]"') from error
    return yaml


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested configurations, one line a field."""
    before, after = flatten(old), flatten(new)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name}: was {before.get(name)!r}, is now {after.get(name)!r}" for name in names]


def _expect(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
