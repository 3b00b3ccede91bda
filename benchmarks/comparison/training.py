"""How every method is trained: the same rows in the same order, AdamW, warm-up and linear decay, clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from examples.demo.train import LengthBatches, collate

from .methods import HEAD_RATE, Method


@dataclass(frozen=True)
class Protocol:
    """What all runs of one table share; runs of different protocols are never mixed.

    train, dev, test: rows of a task at most.
    """

    train: int = 1000
    dev: int = 400
    test: int = 800
    epochs: int = 2
    batch: int = 16
    warmup: float = 0.06
    clip: float = 1.0
    head_rate: float = HEAD_RATE


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimiser(model: nn.Module, method: Method, rate: float, head_rate: float = HEAD_RATE) -> torch.optim.Optimizer:
    """AdamW without decay, the adapter with `rate`, the head with `head_rate`; a head alone learns with `rate`."""
    parameters = trainable(model)
    head = [p for name, p in parameters.items() if ".head." in name]
    adapter = [p for name, p in parameters.items() if ".head." not in name]
    groups = [{"params": head, "lr": head_rate if method.config else rate}]
    groups += [{"params": adapter, "lr": rate}] if adapter else []
    return torch.optim.AdamW(groups, weight_decay=0.0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor], clip: float = 1.0) -> float:
    """One step of training on one batch; the loss before it."""
    loss = model(**batch)["loss"]
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def batches(rows: Sequence[dict], protocol: Protocol, seed: int) -> Iterator[dict[str, Tensor]]:
    """The batches of all epochs; the seed decides their order, whatever the method."""
    sampler = LengthBatches(rows, protocol.batch, seed)
    for _ in range(protocol.epochs):
        for chosen in sampler:
            yield collate([rows[row] for row in chosen])


def train(
    model: nn.Module, method: Method, rows: Sequence[dict], protocol: Protocol, rate: float, seed: int, label: str
) -> float:
    """Train in place; the mean loss of the last tenth of the steps, which is not finite where training diverged."""
    total = math.ceil(len(rows) / protocol.batch) * protocol.epochs
    warm = max(1, round(protocol.warmup * total))
    optimizer = optimiser(model, method, rate, protocol.head_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warm, (total - done) / max(1, total - warm))
    )
    model.train()
    losses = []
    for batch in tqdm(batches(rows, protocol, seed), label, total, leave=False, disable=None, unit="step"):
        losses.append(step(model, optimizer, batch, protocol.clip))
        schedule.step()
    last = losses[-max(1, total // 10) :]
    return sum(last) / len(last)
