"""What every adapter answers alone: a plain transformers model with the adapter folded into its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.serve.workload import targets
from loraxs_ext.basis import Factors
from loraxs_ext.store import AdapterRow

# How far the likeliest token of every step has to be before the next one, in logits. An answer beyond that has one
# right text, in whatever order sums are made; see loop.TIE.
CLEAR = 4e-3


@contextmanager
def folded(model: PreTrainedModel, factors: Mapping[str, Factors], row: AdapterRow | None) -> Iterator[None]:
    """The model with W + s B R A in the place of W, until the context ends; None for the base model."""
    modules = targets(model)
    before = {}
    try:
        if row is not None:
            for (key, r, scaling), offset in zip(row.layout.segments, row.layout.offsets, strict=True):
                weight = modules[key].weight
                before[key] = weight.detach().clone()
                R = row.numbers[offset : offset + r * r].view(r, r).double()
                change = factors[key].bt[:r].double().T @ (scaling * R) @ factors[key].a[:r].double()
                weight.copy_(weight.double() + change)
        yield
    finally:
        for key, weight in before.items():
            modules[key].weight.copy_(weight)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new: int) -> list[str | None]:
    """The greedy text after each prompt; None where another token is almost as likely somewhere.

    Args:
        prompts: int64 [rows, tokens], without padding.
        new: tokens of each answer.
    """
    out = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    found: list[str | None] = []
    ends = _ends(model)
    for row, tokens in enumerate(out.sequences[:, prompts.shape[1] :].tolist()):
        length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        steps = [logits[row].float().topk(2).values for logits in out.logits[: length + 1]]
        clear = all(float(first - second) >= CLEAR for first, second in steps)
        found.append(tokenizer.decode(tokens[:length], skip_special_tokens=True) if clear else None)
    return found


def _ends(model: PreTrainedModel) -> Sequence[int]:
    end = model.generation_config.eos_token_id
    return () if end is None else (end,) if isinstance(end, int) else end
