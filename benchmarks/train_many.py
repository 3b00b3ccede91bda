"""Training 64 adapters in one batch, over training one adapter on the same batch, on this CPU.

    python -m benchmarks.train_many              the decoder of examples/decoder.py; about five minutes on two cores
    python -m benchmarks.train_many --smoke      a small random decoder, a few seconds; nothing is written

A step is forward, backward and AdamW on one batch, one row for each adapter. The gradients of the adapters in the one
batch are compared with those of the row alone first; then the ways to train alternate, and ratios are taken within a
round. `64 steps` trains each adapter on its own row, one after the other, as one does without slots; that switching
adapters costs time too is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks._measure import alternate, ratio, summary, write_results
from loraxs_ext import LoraXSConfig
from loraxs_ext.training.many import ManyAdapters, SlotAdamW, adapter_loss

RANK = 16
TARGETS = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TOGETHER, ALONE, LORA, ONE_BY_ONE = "{} adapters, one batch", "one LoRA-XS", "one PEFT LoRA", "{} adapters, {} steps"
# Tokens per second of many adapters over those of one.
TARGET = 0.9
# Largest difference of a gradient from that of the row alone, relative to its length: rounding of fp32 products of
# other shapes, through all layers and back.
TOLERANCE = 1e-3


def small_decoder() -> PreTrainedModel:
    """A decoder with random weights, for a look whether all of this runs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes))


def real_decoder() -> PreTrainedModel:
    """SmolLM2-135M."""
    from examples.decoder import load_decoder

    return load_decoder()


def tokens(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    """Random tokens [rows, length]: what they say changes no time."""
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def many_step(many: ManyAdapters, ids: Tensor, rows_per_step: int) -> Callable[[], None]:
    """One step of every adapter on its row, `rows_per_step` rows at a time."""
    optimizer = SlotAdamW([many.rows], lr=1e-6)
    parts = list(zip(ids.split(rows_per_step), torch.arange(len(ids)).split(rows_per_step), strict=True))

    def step() -> None:
        for part, slots in parts:
            adapter_loss(many(slots, input_ids=part).logits, part, slots, shift=True).total.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def one_step(model: PeftModel, ids: Tensor) -> Callable[[], None]:
    """One step of one adapter on all rows, with the model's own loss and torch's AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def check(many: ManyAdapters, ids: Tensor, rows: int = 4) -> float:
    """The largest error of the gradients in the one batch, of a few adapters, against those of the row alone.

    Raises:
        AssertionError: it is above the tolerance.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        many.rows.copy_(torch.randn(many.rows.shape, generator=generator) * 0.1)

    def gradient(slots: Tensor) -> Tensor:
        many.rows.grad = None
        part = ids[slots]
        adapter_loss(many(slots, input_ids=part).logits, part, slots, shift=True).total.backward()
        assert many.rows.grad is not None
        return many.rows.grad.to_dense()

    together, errors = gradient(torch.arange(len(ids))), []
    for slot in torch.linspace(0, len(ids) - 1, rows).long().tolist():
        alone = gradient(torch.tensor([slot]))[slot]
        errors.append(float((together[slot] - alone).norm() / alone.norm()))
    many.rows.grad = None
    assert max(errors) <= TOLERANCE, f"gradient: expected at most {TOLERANCE} from that of the row alone, got {errors}"
    return max(errors)


def measure(make_model: Callable[[], PreTrainedModel], adapters: int, length: int, seconds: float) -> dict[str, Any]:
    """One row: a step of every way to train on `adapters` rows of `length` tokens."""
    base = make_model()
    ids = tokens(base, adapters, length)
    many = ManyAdapters(get_peft_model(base, LoraXSConfig(**TARGETS)), [f"user{i}" for i in range(adapters)]).train()
    error = check(many, ids)
    together, one_by_one = TOGETHER.format(adapters), ONE_BY_ONE.format(adapters, adapters)
    steps = {
        ALONE: one_step(get_peft_model(make_model(), LoraXSConfig(**TARGETS)).train(), ids),
        together: many_step(many, ids, adapters),
        LORA: one_step(get_peft_model(make_model(), LoraConfig(**TARGETS)).train(), ids),
        one_by_one: many_step(many, ids, 1),
    }
    samples = alternate(steps, seconds)
    return {
        "model": type(base).__name__,
        "parameters": sum(p.numel() for p in base.parameters()),
        "adapters": adapters,
        "tokens_per_row": length,
        "r": RANK,
        "dtype": "fp32",
        "gradient_error": error,
        "times": {name: summary(values) for name, values in samples.items()},
        "tokens_per_second": {
            name: adapters * length * 1e6 / summary(values)["median_us"] for name, values in samples.items()
        },
        "many_over_one": 1 / ratio(samples, together, ALONE),
        "many_over_lora": 1 / ratio(samples, together, LORA),
        "many_over_one_by_one": 1 / ratio(samples, together, one_by_one),
    }


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and, unless it is a smoke test, write; returns the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=64, help="rows of the batch, each of its own adapter")
    parser.add_argument("--tokens", type=int, default=16, help="of each row")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all ways to train together")
    parser.add_argument("--smoke", action="store_true", help="a small random decoder; nothing is written")
    arguments = parser.parse_args(given)
    if arguments.smoke:
        row = measure(small_decoder, arguments.adapters, arguments.tokens, min(arguments.seconds, 1.0))
    else:
        row = measure(real_decoder, arguments.adapters, arguments.tokens, arguments.seconds)
    print(f"gradients of the batch and of the row alone: {row['gradient_error']:.1e} apart")
    for name, speed in row["tokens_per_second"].items():
        print(f"{name:28} {speed:10,.0f} tokens/s")
    print(f"many over one: {row['many_over_one']:.2f}, goal {TARGET}")
    if not arguments.smoke:
        print(f"written to {write_results('train-many-cpu', [row], target=TARGET, many_over_one=row['many_over_one'])}")
    return row


if __name__ == "__main__":
    main()
