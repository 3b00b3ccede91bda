"""The Hugging Face Trainer for many adapters in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import TaskType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_constant_schedule, get_scheduler
from transformers.trainer_utils import EvalLoopOutput

from .batches import AdapterBatches, SlotCollator, slots_of
from .files import load_all, save_all
from .loss import AdapterLoss, adapter_items, adapter_loss
from .model import ManyAdapters
from .optimizer import Schedule, SlotAdamW

CHECKPOINT = "adapters.safetensors"


class ManyAdaptersTrainer(Trainer):
    """Trains the adapters of `ManyAdapters`, each as if it were alone with its rows.

    Learning rate, warm-up and schedule of the arguments run over each adapter's own steps; `max_grad_norm` clips each
    adapter's gradient by itself. The logged loss is the mean over adapters. Checkpoints hold all adapters and the state
    of the optimiser for each; `resume_from_checkpoint` goes on from them.

    Args:
        model: the adapters.
        args: with `remove_unused_columns=False`, because models know no adapters; `per_device_train_batch_size` does
            not count.
        data_collator: makes a batch of rows without the column of the adapter.
        train_dataset, eval_dataset: of a known length; every row has the name of its adapter, or its slot, in `column`.
        rows_per_adapter, adapters_per_batch, rows_per_epoch: see `AdapterBatches`.
        column: of the adapter.
        log_adapters: log the loss of each adapter too, as `loss/<name>` and `eval_loss/<name>`.
        more: further arguments of the Trainer.

    Raises:
        ValueError: the arguments ask for what is not supported.
    """

    def __init__(
        self,
        model: ManyAdapters,
        args: TrainingArguments,
        data_collator: Callable[[list[dict[str, Any]]], Any],
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        rows_per_adapter: int,
        adapters_per_batch: int,
        rows_per_epoch: int | None = None,
        column: str = "adapter",
        log_adapters: bool = True,
        **more: Any,
    ) -> None:
        _check(args)
        self.many = model
        self.shift = model.template_config.task_type == TaskType.CAUSAL_LM
        self.log_adapters = log_adapters
        self.batches: AdapterBatches | None = None
        if train_dataset is not None:
            names = (model.names[slot] for slot in slots_of(_column(train_dataset, column), model.slot_of, column))
            self.batches = AdapterBatches(
                names, rows_per_adapter, adapters_per_batch, seed=args.seed, rows_per_epoch=rows_per_epoch
            )
        self._schedules = False
        self._train_losses, self._eval_losses = (_Losses(model.names) for _ in range(2))
        collate = SlotCollator(model.slot_of, data_collator, column)
        super().__init__(model, args, collate, train_dataset, eval_dataset, **more)
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `AdapterBatches`."""
        if self.batches is None:
            raise ValueError("train_dataset: expected rows to train on, got None")
        loader: DataLoader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`SlotAdamW` over the rows, unless an optimiser was given."""
        if self.optimizer is None:
            args, self._schedules = self.args, True
            self.optimizer = SlotAdamW(
                [self.many.rows],
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
                max_grad_norm=args.max_grad_norm or None,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """A constant for all; the schedule of each adapter is that of `SlotAdamW`."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if self._schedules and isinstance(inner, SlotAdamW) and self.batches is not None:
            steps = self.batches.own_steps(num_training_steps, self.args.gradient_accumulation_steps)
            inner.schedule = _own_schedule(self.args, {self.many.slot_of[str(name)]: n for name, n in steps.items()})
        if self.lr_scheduler is None:
            self.lr_scheduler = get_constant_schedule(cast(torch.optim.Optimizer, self.optimizer))
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum over adapters of their mean losses; `num_items_in_batch` are the labels of each, int64 [S]."""
        inputs = dict(inputs)
        labels, slots = inputs.pop("labels"), inputs["slots"]
        outputs = model(**inputs)
        items = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else None
        loss = adapter_loss(outputs["logits"], labels, slots, shift=self.shift, items=items)
        (self._train_losses if model.training else self._eval_losses).add(slots, loss)
        return (loss.total, outputs) if return_outputs else loss.total

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the Trainer's; returns the mean over adapters, for the log."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        assert isinstance(num_items_in_batch, Tensor)
        return loss / (num_items_in_batch > 0).sum().clamp_min(1)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's; the loss is the mean over adapters of the mean over their rows."""
        self._eval_losses.clear()
        output = super().evaluation_loop(*args, **kwargs)
        means, prefix = self._eval_losses.means(), kwargs.get("metric_key_prefix", "eval")
        if means and output.metrics is not None:
            output.metrics[f"{prefix}_loss"] = sum(means.values()) / len(means)
            if self.log_adapters:
                output.metrics.update({f"{prefix}_loss/{name}": loss for name, loss in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the training loss of each adapter since the last time."""
        if "loss" in logs:
            if self.log_adapters:
                logs |= {f"loss/{name}": loss for name, loss in self._train_losses.means().items()}
            self._train_losses.clear()
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        counts = [
            adapter_items(batch["labels"], batch["slots"], len(self.many.names), shift=self.shift)
            for batch in batch_samples
            if "labels" in batch
        ]
        return torch.stack(counts).sum(0).to(device) if counts else None

    # `SlotAdamW` clips; a norm over all adapters would mean nothing.
    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        save_all(self.many, folder / CHECKPOINT)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_all(self.many, Path(resume_from_checkpoint) / CHECKPOINT)

    def _load_best_model(self) -> None:
        load_all(self.many, Path(str(self.state.best_model_checkpoint)) / CHECKPOINT)


class _Losses:
    """Summed losses and labels of each adapter since they were last cleared."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.clear()

    def clear(self) -> None:
        self._sums: Tensor | None = None

    def add(self, slots: Tensor, loss: AdapterLoss) -> None:
        slots = slots.to(loss.sums.device, torch.int64)
        values = torch.stack([loss.sums.double(), loss.items.double()], dim=1) * (slots >= 0)[:, None]
        if self._sums is None:
            self._sums = values.new_zeros(len(self.names), 2)
        self._sums.index_add_(0, slots.clamp_min(0), values)

    def means(self) -> dict[str, float]:
        """By name, of those that had a label."""
        found = [] if self._sums is None else self._sums.tolist()
        return {name: total / items for name, (total, items) in zip(self.names, found, strict=False) if items}


def _check(args: TrainingArguments) -> None:
    """Refuse what would be ignored, or is not made for more than one adapter."""
    for name in ("remove_unused_columns", "label_smoothing_factor", "torch_compile"):
        if value := getattr(args, name):
            raise ValueError(f"args: {name}: expected {type(value)()!r}, got {value!r}")
    if not str(getattr(args.optim, "value", args.optim)).startswith("adamw_torch"):
        raise ValueError(
            f"args: optim: expected 'adamw_torch', which SlotAdamW is for each adapter, got {args.optim!r}"
        )
    if args.world_size * max(args.n_gpu, 1) > 1:
        raise ValueError(f"args: expected one process and device, got {args.world_size} and {args.n_gpu}")


def _own_schedule(args: TrainingArguments, steps: Mapping[int, int]) -> Schedule:
    """The schedule of the arguments over the steps of each slot."""

    def make(total: int) -> Callable[[int], float]:
        # What every schedule of transformers with a name is: a function of the step, on some optimiser.
        unused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule: Any = get_scheduler(
            args.lr_scheduler_type,
            unused,
            num_warmup_steps=args.get_warmup_steps(total),
            num_training_steps=total,
            scheduler_specific_kwargs=cast(Any, args.lr_scheduler_kwargs),
        )
        if not hasattr(schedule, "lr_lambdas"):
            raise ValueError(f"args: lr_scheduler_type: expected a function of the step, got {args.lr_scheduler_type}")
        return schedule.lr_lambdas[0]

    by_total = {total: make(total) for total in set(steps.values())}
    return lambda slot, step: by_total[steps[slot]](step)


def _column(dataset: Any, column: str) -> Any:
    """The values of one column; of a `datasets` table without decoding the others."""
    names = getattr(dataset, "column_names", None)
    return dataset[column] if names is not None and column in names else (row[column] for row in dataset)
