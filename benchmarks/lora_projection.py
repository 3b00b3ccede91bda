"""How much of a trained LoRA lies in the basis of LoRA-XS: the residual of `from_lora` by rank, on MiniLM.

    python -m benchmarks.lora_projection

Trains a LoRA on real text, saves it, projects it at several ranks, and classifies with what is left. At full rank
nothing of a square layer may be lost: that is checked before anything is printed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from examples.demo.data import load_tasks
from examples.demo.fetch import ENCODER, SENTENCES, fetch
from examples.demo.model import TARGETS, load_tokenizer
from examples.demo.train import collate, encode
from loraxs_ext import LoraXSConfig, from_lora
from loraxs_ext.checkpoint import residuals

# The largest first: the cache serves the others with its first rows.
RANKS = (384, 256, 128, 64, 16, 4)


def main() -> None:
    """Train, project at every rank, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA (default %(default)s)")
    parser.add_argument("--rows", type=int, default=800, help="to train on (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="default %(default)s")
    parser.add_argument("--test-rows", type=int, default=400, help="to classify (default %(default)s)")
    arguments = parser.parse_args()
    encoder = fetch(ENCODER)
    task = load_tasks(fetch(SENTENCES), (arguments.rows, 0, arguments.test_rows))[0]
    tokenizer = load_tokenizer(encoder)
    parts = {name: encode(tokenizer, getattr(task, name)) for name in ("train", "test")}
    torch.manual_seed(0)

    def base() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, hidden_dropout_prob=0.0)

    config = LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=TARGETS, task_type="SEQ_CLS")
    lora = get_peft_model(base(), config)
    train(lora, parts["train"], arguments.epochs)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "lora"
        lora.save_pretrained(folder)
        rows = []
        for rank in RANKS:
            model = from_lora(base(), folder, LoraXSConfig(r=rank, lora_alpha=rank, svd="exact"), threshold=1.0)
            kept = residuals(model, folder)
            rows.append((rank, kept.residual, min(m.residual for m in kept.modules), accuracy(model, parts["test"])))
        if not rows[0][2] < 1e-4:
            raise AssertionError(f"a basis of full rank holds any LoRA of a square layer, got {rows[0][2]:.1e} lost")
    majority = max(task.test.labels.count(label) for label in (0, 1)) / len(task.test)
    print(f"{task.title}, {len(task.test)} test rows: LoRA of rank {arguments.rank}, ", end="")
    print(f"accuracy {accuracy(lora, parts['test']):.1%}; the more frequent class {majority:.1%}")
    print("| r | residual of all modules | least of one module | accuracy after projection |\n|--:|--:|--:|--:|")
    for rank, residual, least, score in reversed(rows):
        print(f"| {rank} | {residual:.3f} | {least:.3f} | {score:.1%} |")


def train(model: PeftModel, examples: list[dict], epochs: int) -> None:
    """AdamW over shuffled batches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(examples)).tolist()
        for start in tqdm(range(0, len(order), 32), desc="train", unit="step", disable=None):
            optimizer.zero_grad()
            model(**collate([examples[row] for row in order[start : start + 32]])).loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, examples: list[dict]) -> float:
    """Share of rows classified as labelled."""
    model.eval()
    return sum(float(hits.sum()) for hits in _hits(model, examples)) / len(examples)


def _hits(model: nn.Module, examples: list[dict]) -> Iterator[Tensor]:
    for start in range(0, len(examples), 64):
        batch = collate(examples[start : start + 64])
        yield model(**batch).logits.argmax(-1) == batch["labels"]


if __name__ == "__main__":
    main()
