"""`evaluate(run)`: the trained adapter, or the base model alone, on the test rows."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from loraxs_ext.files import atomic_file, read_json, write_json

from . import classification, instruction
from .folder import RunFolder
from .generation import AnswersFile, Writer, answer_all
from .pretrained import device_for, load_causal, load_classifier, load_tokenizer
from .settings import ClassificationRun, InstructionRun, Run
from .start import WEIGHTS
from .tables import content_digest
from .train import claim


def evaluate(run: Run, *, base: bool = False) -> dict[str, Any]:
    """Evaluate on `data.test` and write what was predicted beside the adapter.

    Classification writes `predictions.jsonl`; instruction tuning appends to `answers.jsonl`, or `answers-base.jsonl`,
    and goes on in it after an interruption. Metrics go to `evaluation.json`, or `evaluation-base.json`.

    Args:
        run: the configuration it was trained with.
        base: evaluate the model without its adapter; instruction tuning only.

    Raises:
        FileNotFoundError: nothing is trained in `run.output`.
        ValueError: a setting does not fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluation: expected one process, got several")
    folder, started = RunFolder(run.output), time.monotonic()
    if base and isinstance(run, ClassificationRun):
        raise ValueError("base: expected an instruction run, got a classifier, whose head exists only once trained")
    if not base and not folder.result.exists():
        raise FileNotFoundError(f"output: expected a finished run, found none in {folder.path}; train it first")
    with folder.attempt(claim(run, folder)):
        if isinstance(run, ClassificationRun):
            outcome = _classification(run, folder)
        else:
            outcome = _instruction(cast(InstructionRun, run), folder, base)
    outcome["seconds"] = round(time.monotonic() - started, 1)
    write_json(folder.path / ("evaluation-base.json" if base else "evaluation.json"), outcome)
    return outcome


def _classification(run: ClassificationRun, folder: RunFolder) -> dict[str, Any]:
    data = run.data
    table, labelled = classification.read_test(data)
    labels = classification.Labels(read_json(folder.result)["labels"])
    tokenizer = load_tokenizer(run.model)
    examples = classification.encode(table, data, labels, tokenizer, labelled)
    truth = [example.pop("labels") for example in examples] if labelled else None
    config = run.adapter_config()
    model: nn.Module = load_classifier(
        run.model, tokenizer, labels.names, config.modules_to_save or (), run.training.seed
    )
    model = _with_adapter(model, folder, run)
    logits = _logits(model, examples, classification.Pad(tokenizer), run)
    path = folder.path / "predictions.jsonl"
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i, row in enumerate(table.rows):
            entry = {"row": i, **labels.prediction(logits[i])}
            if labelled:
                entry["label"] = row[data.label] if truth is None or labels.names is None else labels.names[truth[i]]
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    metrics = {} if truth is None else labels.metrics(logits, np.array(truth))
    return {"rows": len(table), **metrics, "predictions": str(path)}


def _instruction(run: InstructionRun, folder: RunFolder, base: bool) -> dict[str, Any]:
    rows = instruction.read_test(run.data)[: run.generation.limit]
    tokenizer = load_tokenizer(run.model)
    template = instruction.Template(run.data, tokenizer)
    made_with = {
        "model": run.model.name,
        "dtype": run.model.dtype,
        "adapter": None if base else content_digest(str(folder.adapter / WEIGHTS)),
        "test": content_digest(cast(str, run.data.test)),
        "data": {name: getattr(run.data, name) for name in ("prompt", "input", "response", "answer", "template")},
        # How many rows, and how many at once, changes no answer.
        "generation": {k: v for k, v in asdict(run.generation).items() if k not in ("limit", "batch")},
    }
    path = folder.path / ("answers-base.jsonl" if base else "answers.jsonl")
    file = AnswersFile(path, made_with)
    model: nn.Module = load_causal(run.model, tokenizer)
    model = model.to(device_for(run.training.cpu)).eval() if base else _with_adapter(model, folder, run)
    with _autocast(run, model):
        return {**answer_all(Writer(model, template, run.generation), rows, file), "answers": str(path)}


def _with_adapter(model: nn.Module, folder: RunFolder, run: Run) -> nn.Module:
    adapted = PeftModel.from_pretrained(cast(Any, model), str(folder.adapter))
    return adapted.to(device_for(run.training.cpu)).eval()


@torch.inference_mode()
def _logits(model: nn.Module, examples: list[dict[str, Any]], collate: Any, run: Run) -> np.ndarray:
    """Logits [rows, classes] in the order of the examples; rows of like length are computed together."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    device, size = next(model.parameters()).device, run.training.eval_batch
    found: dict[int, np.ndarray] = {}
    for start in tqdm(range(0, len(order), size), desc="test", unit="batch"):
        numbers = order[start : start + size]
        batch = collate([examples[i] for i in numbers]).to(device)
        with _autocast(run, model):
            logits = model(**batch).logits.float().cpu().numpy()
        found |= dict(zip(numbers, logits, strict=True))
    return np.stack([found[i] for i in range(len(examples))])


def _autocast(run: Run, model: nn.Module) -> torch.autocast:
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=run.training.bf16)
