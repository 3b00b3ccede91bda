"""`train(run)`: from a configuration to a trained adapter, its metrics and its measurements."""

from __future__ import annotations

import platform
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import EvalPrediction
from transformers.integrations import TensorBoardCallback

from loraxs_ext.basis.distributed import across_ranks, is_running
from loraxs_ext.files import read_json, write_json
from loraxs_ext.peft import gather_adapter

from . import classification, instruction
from .folder import RunFolder
from .pretrained import load_causal, load_classifier, load_tokenizer
from .settings import ClassificationRun, InstructionRun, Run
from .start import WEIGHTS, continue_from
from .tables import content_digest
from .trainer import Prepared, make_trainer, training_arguments


def train(run: Run) -> dict[str, Any]:
    """Train, or go on with what was started in `run.output`; a finished run is returned as it is.

    Returns:
        What `result.json` in the output folder holds: metrics on dev, the best step, parameters, bytes, seconds.

    Raises:
        ValueError: a setting does not fit the model, the data or the output folder; the message names it.
        OSError: a file cannot be read or written.
    """
    folder = RunFolder(run.output)
    best = run.best()
    arguments = training_arguments(run, folder, best)
    with arguments.main_process_first(local=False):
        new = claim(run, folder)
        if folder.result.exists():
            return read_json(folder.result)
        checkpoint = folder.last_checkpoint()
    with folder.attempt(new):
        return _train(run, folder, arguments, best, checkpoint)


def _train(
    run: Run, folder: RunFolder, arguments: transformers.TrainingArguments, best: str | None, checkpoint: Path | None
) -> dict[str, Any]:
    prepared = _classification(run) if isinstance(run, ClassificationRun) else _instruction(cast(InstructionRun, run))
    # Before it is sharded.
    parameters = count_parameters(prepared.model)
    trainer, keeper = make_trainer(run, folder, arguments, prepared, checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Curves end with the training; what is measured of the best checkpoint is no point of theirs.
    trainer.remove_callback(TensorBoardCallback)
    metrics = trainer.evaluate() if best else {}
    seconds = keeper.seconds
    state_dict = gather_adapter(cast(torch.nn.Module, trainer.model))
    if trainer.is_world_process_zero():
        with folder.new_adapter() as staged:
            prepared.model.save_pretrained(str(staged), state_dict=state_dict)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "task": run.task,
            "model": run.model.name,
            "adapter": str(folder.adapter),
            "dev": {name.removeprefix("eval_"): value for name, value in metrics.items() if _is_measure(name)},
            "chosen_by": best,
            "best_step": trainer.state.best_global_step if best else trainer.state.global_step,
            "steps": trainer.state.global_step,
            "loss": {"first": losses[0], "last": losses[-1]} if losses else {},
            "rows": {"train": len(prepared.train), "dev": len(prepared.dev or ())},
            "processes": arguments.world_size,
            "parameters": parameters,
            "bytes": (folder.adapter / WEIGHTS).stat().st_size,
            "seconds": round(seconds, 1),
            "seed": run.training.seed,
            "device": str(arguments.device),
            "versions": _versions(),
            **prepared.facts,
        }
        write_json(folder.result, result)
        folder.remove_checkpoints()
    trainer.accelerator.wait_for_everyone()
    return read_json(folder.result)


def claim(run: Run, folder: RunFolder) -> bool:
    """Tie the output folder to the run's settings and to the contents of its files; whether it was not tied before."""
    data = cast(Any, run).data
    files = {"data.train": data.train, "data.dev": data.dev}
    if run.start_from is not None:
        files["start_from"] = str(Path(run.start_from) / WEIGHTS)
    return folder.claim(run.to_dict(), {name: content_digest(path) for name, path in files.items() if path is not None})


def count_parameters(model: PeftModel) -> dict[str, int]:
    """Trained numbers in the adapter and in the head, and the frozen ones."""
    counts = {"adapter": 0, "head": 0, "frozen": 0}
    for name, parameter in model.named_parameters():
        kind = ("head" if ".modules_to_save." in name else "adapter") if parameter.requires_grad else "frozen"
        counts[kind] += parameter.numel()
    return counts


def _classification(run: ClassificationRun) -> Prepared:
    data = run.data
    train_rows, dev_rows, labels = classification.read_splits(data)
    tokenizer = load_tokenizer(run.model)
    # Before the model is loaded: a label that is not known is cheap to find.
    train_examples = classification.encode(train_rows, data, labels, tokenizer)
    dev_examples = classification.encode(dev_rows, data, labels, tokenizer)
    config = run.adapter_config()
    base = load_classifier(run.model, tokenizer, labels.names, config.modules_to_save or (), run.training.seed)
    model, notes = _adapted(run, base)

    def metrics(output: EvalPrediction) -> dict[str, float]:
        return labels.metrics(cast(Any, output.predictions), cast(Any, output.label_ids))

    facts = {"labels": labels.names, **({"continued": notes} if run.start_from else {})}
    return Prepared(model, train_examples, dev_examples, classification.Pad(tokenizer), metrics, facts)


def _instruction(run: InstructionRun) -> Prepared:
    train_rows, dev_rows = instruction.read_splits(run.data)
    tokenizer = load_tokenizer(run.model)
    template = instruction.Template(run.data, tokenizer)
    train_examples = instruction.encode(train_rows, template, run.data.max_length)
    dev_examples = instruction.encode(dev_rows, template, run.data.max_length) if dev_rows else None
    transformers.set_seed(run.training.seed)
    model, _ = _adapted(run, load_causal(run.model, tokenizer))
    collate = instruction.Pad(int(cast(Any, tokenizer.pad_token_id)))
    return Prepared(model, train_examples, dev_examples, collate, None, {})


def _adapted(run: Run, base: transformers.PreTrainedModel) -> tuple[PeftModel, list[str]]:
    # The cache of keys and values is of no use in training, and gradient checkpointing warns of it.
    base.config.use_cache = False
    with across_ranks() if is_running() else nullcontext():
        model = cast(PeftModel, get_peft_model(base, run.adapter_config()))
    notes = continue_from(model, run.start_from, run.keep_head) if run.start_from else []
    for note in notes:
        warnings.warn(f"start_from: {note}", stacklevel=2)
    return model, notes


def _is_measure(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))


def _versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "peft": peft}
    return {"python": platform.python_version(), **{name: cast(Any, m).__version__ for name, m in modules.items()}}
