"""The Hugging Face Trainer, set up so that a run that was killed goes on exactly where its last checkpoint stands."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from loraxs_ext.peft.gathering import gather_adapter, unwrapped

from .folder import RunFolder
from .pretrained import device_for
from .settings import InstructionRun, Run, TrainingSettings


@dataclass(frozen=True)
class Prepared:
    """What a task hands to the Trainer.

    Attributes:
        model: with its adapter.
        train, dev: tokenised rows; dev may be None.
        collate: makes a batch of them.
        metrics: of logits and labels on dev; None for the loss alone.
        facts: for the result.
    """

    model: PeftModel
    train: list[dict[str, Any]]
    dev: list[dict[str, Any]] | None
    collate: Callable[..., Any]
    metrics: Callable[[EvalPrediction], dict[str, float]] | None
    facts: dict[str, Any]


def training_arguments(run: Run, folder: RunFolder, best: str | None) -> TrainingArguments:
    """The Trainer's arguments; best: the metric on dev, None without dev."""
    training, per = run.training, "epoch" if run.training.checkpoint_steps is None else "steps"
    # Without being told, the Trainer does not divide the rows among processes on CPUs.
    on_cpu = device_for(training.cpu).type == "cpu"
    return TrainingArguments(
        output_dir=str(folder.path),
        per_device_train_batch_size=training.batch,
        per_device_eval_batch_size=training.eval_batch,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.lr,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        warmup_steps=training.warmup,
        lr_scheduler_type=training.scheduler,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        seed=training.seed,
        use_cpu=on_cpu,
        gradient_checkpointing=run.model.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if run.model.gradient_checkpointing else None,
        eval_strategy="no" if best is None else per,
        eval_steps=training.checkpoint_steps,
        save_strategy=per,
        save_steps=training.checkpoint_steps or 500,
        load_best_model_at_end=best is not None,
        metric_for_best_model=best,
        greater_is_better=best != "loss",
        logging_steps=training.log_steps,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not on_cpu,
        report_to=[],
    )


def adamw(model: nn.Module, training: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over what is trainable: the adapter with lr, whatever modules_to_save trains completely with head_lr."""
    adapter: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if ".modules_to_save." in name else adapter).append(parameter)
    groups: list[dict[str, Any]] = [{"params": adapter, "lr": training.lr}]
    if head:
        groups.append({"params": head, "lr": training.lr if training.head_lr is None else training.head_lr})
    return torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay)


def make_trainer(
    run: Run, folder: RunFolder, arguments: TrainingArguments, prepared: Prepared, resume: Path | None
) -> tuple[Trainer, Keeper]:
    """The Trainer, and the callback that knows how long all sessions of the run have taken."""
    keeper = Keeper(folder, float(folder.facts_of(resume)["seconds"]) if resume else 0.0)
    step = int(resume.name.rpartition("-")[2]) if resume else 0
    callbacks: list[TrainerCallback] = [keeper]
    if arguments.process_index == 0:
        callbacks.append(TensorBoardCallback(_summary_writer(folder, step)))
    trainer = AdapterTrainer(
        run.training,
        isinstance(run, InstructionRun),
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.dev,
        data_collator=prepared.collate,
        compute_metrics=prepared.metrics,
        callbacks=callbacks,
    )
    return trainer, keeper


class AdapterTrainer(Trainer):
    """The Trainer with our optimiser, whose checkpoints hold a plain and complete adapter however it is distributed.

    Args:
        training: settings of the optimiser.
        per_token: whether the loss is a mean over tokens, which rows have different numbers of.
        arguments: of the Trainer.
    """

    def __init__(self, training: TrainingSettings, per_token: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.training = training
        # A classifier takes the arguments of a loss per token and ignores them: it returns the mean over its rows. The
        # Trainer, which believes that it obeys, would not average over accumulated batches and processes.
        self.model_accepts_loss_kwargs &= per_token

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Of the parameters of `model`, once FSDP1 has wrapped it, or of those of the model as it is."""
        if self.optimizer is None:
            self.optimizer = adamw(cast(nn.Module, self.model if model is None else model), self.training)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; collective."""
        model = cast(nn.Module, self.model)
        state_dict = gather_adapter(model)
        if self.args.should_save:
            cast(PeftModel, unwrapped(model)).save_pretrained(
                str(output_dir or self.args.output_dir), state_dict=state_dict
            )


class Keeper(TrainerCallback):
    """Completes checkpoints, and ends a stretch of the loss curve with each, so that a resumed curve is the same.

    Args:
        folder: of the run.
        seconds: that earlier sessions of the run have taken.
    """

    def __init__(self, folder: RunFolder, seconds: float) -> None:
        self.folder, self.before = folder, seconds
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, without what was done after the last checkpoint of a killed session."""
        return self.before + time.monotonic() - self.started

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.monotonic()
        if state.best_model_checkpoint:
            # The folder may have moved since.
            state.best_model_checkpoint = str(self.folder.path / Path(state.best_model_checkpoint).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= control.should_save

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= control.should_save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A checkpoint is complete when the last process has written its part, and no process goes on before it is.
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            self.folder.complete(state.global_step, {"seconds": self.seconds}, state.best_model_checkpoint)
        PartialState().wait_for_everyone()


def _summary_writer(folder: RunFolder, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('training writes TensorBoard logs: pip install "loraxs-ext[train]"') from error
    # Points behind the checkpoint are those of a killed session.
    return SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else None)
