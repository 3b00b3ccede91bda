"""generate() with a clock in it, and how a row of its result is checked against the row alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.serve.workload import Batch

# How far below the largest logit a token may lie that a row chose among other rows and would not choose alone: a batch
# of another size is summed in another order. Logits reach 30, where neighbouring bf16 numbers are 1/8 apart; the
# decoder without adapters, batched, strays by up to 3 of these steps from itself alone.
TIE = {torch.bfloat16: 0.5, torch.float32: 2e-3}

Context = Callable[[], AbstractContextManager[Any]]


class WrongTokens(Exception):
    """A row of a batch is not what it is alone; there is no figure for such a batch."""


class Run(NamedTuple):
    """One timed call.

    Attributes:
        tokens: int64 [rows, new], what was generated.
        total, prefill, step: seconds of the call, of its first token, and of a later token by the median.
    """

    tokens: Tensor
    total: float
    prefill: float
    step: float


class _Clock(StoppingCriteria):
    """Notes when each token was done; stops nothing."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def timed_generate(model: Any, batch: Batch, new_tokens: int, context: Context = nullcontext, **more: Any) -> Run:
    """Greedy generation of exactly `new_tokens` for each row, at least 2.

    Args:
        model: a transformers model, or a PeftModel.
        batch: the prompts.
        new_tokens: per row.
        context: entered within the timed part, as a server has to.
        more: further arguments of generate().
    """
    clock = _Clock()
    start = time.perf_counter()
    with context(), torch.inference_mode():
        found = model.generate(
            input_ids=batch.ids, attention_mask=batch.mask, do_sample=False, min_new_tokens=new_tokens,
            max_new_tokens=new_tokens, stopping_criteria=StoppingCriteriaList([clock]), **more,
        )  # fmt: skip
    total = time.perf_counter() - start
    steps = [after - before for before, after in zip(clock.at, clock.at[1:], strict=False)]
    return Run(found[:, batch.ids.shape[1] :], total, clock.at[0] - start, statistics.median(steps))


@torch.inference_mode()
def shortfall(model: PreTrainedModel, batch: Batch, i: int, tokens: Tensor, context: Context = nullcontext) -> float:
    """By how much the generated tokens of row i miss the largest logit, at worst, where the row is computed alone.

    Args:
        model: the model.
        batch: the prompts.
        i: the row.
        tokens: [rows, new], generated for all rows.
        context: in which row i alone has its adapter.
    """
    prompt = batch.row(i)
    ids = torch.cat([prompt, tokens[i : i + 1]], 1)
    with context():
        logits = model(input_ids=ids, logits_to_keep=tokens.shape[1] + 1).logits[0, :-1].float()
    # generate() forbids the end before the last token.
    ends = model.generation_config.eos_token_id
    logits[:, [ends] if isinstance(ends, int) else ends] = -torch.inf
    chosen = logits.gather(1, tokens[i][:, None])[:, 0]
    return float((logits.amax(1) - chosen).max())


def sample(rows: int, most: int = 4) -> list[int]:
    """Some rows, the first and the last among them."""
    return sorted({round(k * (rows - 1) / max(1, most - 1)) for k in range(most)})
