"""Users with tastes of their own: what kind of real text each of them likes, and a model that guesses it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from examples.demo.data import SOURCES, read_sentences

# Two of four sources are liked. Over all tastes, every sentence is liked as often as not.
TASTES = tuple(combinations(SOURCES, len(SOURCES) // 2))
MAX_TOKENS = 32
CLASSES = ("I do not like this.", "I like this.")


@dataclass(frozen=True)
class User:
    """A reader with a taste, and sentences that nobody else has, tokenised and labelled by it."""

    name: str
    likes: tuple[str, ...]
    train: list[dict]
    test: list[dict]


def make_users(
    count: int, sizes: tuple[int, int], folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> list[User]:
    """Users who like half of what they read: as many sentences of each source, tastes in turn.

    sizes: rows (train, test) of each user, multiples of 4.
    folder: with the files of `examples.demo.data.SOURCES`.

    Raises ValueError when a size does not fit, or there are not enough sentences.
    """
    if count < 1 or any(size < 1 or size % len(SOURCES) for size in sizes):
        raise ValueError(f"users: expected some, with multiples of {len(SOURCES)} rows, got {count} with {sizes}")
    draw = random.Random(seed)
    texts = _texts(folder)
    for found in texts.values():
        draw.shuffle(found)
    scarcest = min(map(len, texts.values())) * len(SOURCES)
    if count * sum(sizes) > scarcest:
        raise ValueError(f"users: expected at most {scarcest // sum(sizes)} with {sum(sizes)} rows each, got {count}")
    users = []
    for i in range(count):
        name, likes = f"user{i:02}", TASTES[i % len(TASTES)]
        parts = []
        for size in sizes:
            own = [(found.pop(), source) for source, found in texts.items() for _ in range(size // len(SOURCES))]
            ids = tokenizer([text for text, _ in own], truncation=True, max_length=MAX_TOKENS)["input_ids"]
            parts.append(
                [
                    {"input_ids": tokens, "labels": int(source in likes), "adapter": name}
                    for tokens, (_, source) in zip(ids, own, strict=True)
                ]
            )
        users.append(User(name, likes, *parts))
    return users


def _texts(folder: Path) -> dict[str, list[str]]:
    """By source, sentences of at least four words, each once; lower-cased, so that capitals alone don't tell."""
    seen: set[str] = set()
    texts: dict[str, list[str]] = {}
    for source, file in SOURCES.items():
        lowered = (sentence.text.lower() for sentence in read_sentences(folder / file))
        texts[source] = [t for t in dict.fromkeys(lowered) if len(t.split()) >= 4 and t not in seen]
        seen.update(texts[source])
    return texts


class Liking(nn.Module):
    """Guesses whether a reader likes a text: by how near its embedding is to that of "I like this.".

    Nothing here is trained: the head is the encoder's own, so that an adapter is its R matrices alone, and readers with
    different adapters fit in one batch.

    encoder: a transformers encoder; its pooler is not used.
    prototypes: [2, hidden], embeddings of the classes.
    """

    temperature = 0.05

    def __init__(self, encoder: nn.Module, prototypes: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.register_buffer("prototypes", nn.functional.normalize(prototypes, dim=1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """`logits` [rows, 2]: not liked, liked."""
        embedding = embed(self.encoder, input_ids, attention_mask)
        return {"logits": nn.functional.normalize(embedding, dim=1) @ self.prototypes.mT / self.temperature}


def embed(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[rows, hidden]: the mean over tokens."""
    tokens = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * mask).sum(1) / mask.sum(1)


def make_model(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Liking:
    """The model with its head, in eval mode."""
    batch = tokenizer(list(CLASSES), padding=True, return_tensors="pt")
    with torch.no_grad():
        prototypes = embed(encoder.eval(), batch["input_ids"], batch["attention_mask"])
    return Liking(encoder, prototypes).eval()


def pad(examples: Sequence[dict]) -> dict[str, Tensor]:
    """A batch: input_ids and attention_mask int64 [rows, tokens], labels int64 [rows]."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
