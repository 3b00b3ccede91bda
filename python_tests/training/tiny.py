"""Tiny models from configurations, a tokenizer of a few words, and toy data, all saved to a folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOOD, BAD = ("good", "fine", "great"), ("bad", "dull", "poor")
NOUNS = ("film", "plot", "cast", "song", "end", "book")
DIGITS = tuple(str(i) for i in range(20))
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<user>", "<bot>")
WORDS = (*SPECIAL, *GOOD, *BAD, *NOUNS, "the", "is", "and", *DIGITS, "+", "=", "answer", "The", ".", ":", "####")
CHAT = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}{{ ' </s>' }}"
    "{% if m.role == 'user' and not loop.last %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <bot> ' }}{% endif %}"
)


def save_tokenizer(folder: Path, *, chat: bool = False) -> PreTrainedTokenizerFast:
    """Whole words between white space; texts begin with <s>, pairs have it between them too."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_bert(folder: Path, *, pooler: bool = True, dropout: float = 0.1) -> str:
    """An encoder without a head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    noise = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0, **sizes, **noise)
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_llama(folder: Path, *, chat: bool = False) -> str:
    """A decoder with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    # Large weights: the frozen head must be able to prefer one word clearly.
    config = LlamaConfig(
        vocab_size=len(WORDS), intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
        **sizes, **tokens,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, chat=chat)
    return str(folder)


def reviews(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences whose label stands in one of their words."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(("negative", "positive"))
        words = [draw.choice(NOUNS) for _ in range(draw.randint(1, 6))]
        verdict = draw.choice(GOOD if label == "positive" else BAD)
        rows.append({"sentence": " ".join(["the", *words, "is", verdict]), "label": label})
    return rows


def sums(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Additions with an answer in words and a marked one."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
    return [{"prompt": f"{a} + {b}", "response": f"The answer is : {a + b} .", "answer": str(a + b)} for a, b in pairs]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
