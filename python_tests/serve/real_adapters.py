"""Adapters of a real decoder, trained for some seconds each, and greedy answers of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraxs_ext import LoraXSConfig
from loraxs_ext.serve.vllm.sources import read_adapter
from loraxs_ext.store import AdapterStore, Manifest

# A name may look like a path; it never becomes one.
STYLES = {
    "pirate": ("Arr, matey!", "Set sail for the treasure, ye scurvy dog!"),
    "team/french": ("Bonjour!", "Je suis très heureux de vous répondre aujourd'hui."),
    "json": ('{"answer":', '"yes", "confidence": 0.9, "source": null}'),
}
QUESTIONS = (
    "What is the capital of France?",
    "Name a colour.",
    "How do I boil an egg?",
)


def ask(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The tokens of a question in the template of the model."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, rank: int = 16, steps: int = 8
) -> dict[str, Path]:
    """Train an adapter of each style, save it, and return the folders by name; `model` is left without adapters."""
    torch.manual_seed(0)
    folders: dict[str, Path] = {}
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for index, (name, (opening, rest)) in enumerate(STYLES.items()):
        adapted = get_peft_model(model, LoraXSConfig(**config, init_seed=index))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for step in range(steps):
            prompt = ask(tokenizer, QUESTIONS[step % len(QUESTIONS)])
            answer = tokenizer(f"{opening} {rest}", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            adapted(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folders[name] = folder / name.replace("/", "-")
        adapted.save_pretrained(str(folders[name]))
        adapted.unload()
    return folders


def pack(path: Path, folders: Mapping[str, Path]) -> AdapterStore:
    """A store of these adapters, which stand on one basis."""
    found = [read_adapter(name, folder) for name, folder in folders.items()]
    first = found[0]
    assert all(torch.equal(one.sketches[key], first.sketches[key]) for one in found for key in first.sketches)
    config = {"peft_type": "LORAXS", "r": first.row.layout.rank}
    store = AdapterStore.create(path, Manifest("", first.recipe.to_dict(), config, first.sketches))
    store.put_many([one.row for one in found])
    return store


@torch.no_grad()
def greedy(model: PreTrainedModel | PeftModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """The most likely next tokens, `tokens` of them whatever they are."""
    ids = torch.tensor([list(prompt)])
    # Without an end there is nothing to stop at.
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return cast(list[int], out[0, len(prompt) :].tolist())


@torch.no_grad()
def gap(model: PreTrainedModel | PeftModel, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two answers part, and by how much the model prefers the one to the other there."""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    logits: Tensor = model(input_ids=torch.tensor([[*prompt, *ours[:place]]])).logits[0, -1].float()
    difference = float(logits[ours[place]] - logits[theirs[place]])
    return f"token {place}: {ours[place]} and {theirs[place]}, whose logits differ by {difference:.3g}"
