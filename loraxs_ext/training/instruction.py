"""Instruction tuning: prompts and responses to tokens, with the loss on the response alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .settings import InstructionData
from .tables import Row, Table, read_table, split_off

IGNORED = -100

# The prompts of Stanford Alpaca, which the reference uses.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class Template:
    """How a row becomes a prompt and a response.

    Args:
        data: names the columns and the template.
        tokenizer: of the model; "chat" takes its template.

    Raises:
        ValueError: "chat", but the tokenizer has no chat template.
    """

    data: InstructionData
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if self.data.template == "chat" and not self.tokenizer.chat_template:
            raise ValueError("data.template: expected a tokenizer with a chat template, got one without")

    def prompt(self, row: Row) -> str:
        """The text that the model is to go on from."""
        prompt, more = self._asked(row)
        if self.data.template == "alpaca":
            return _fill(_ALPACA_INPUT if more else _ALPACA, prompt, more)
        if self.data.template == "chat":
            return self._chat([self._question(row)], True)
        if self.data.template == "plain":
            return f"{prompt}\n{more}" if more else prompt
        return _fill(self.data.template, prompt, more)

    def response(self, row: Row) -> str:
        """The text that is learnt, with its end of turn or sequence."""
        response = str(row[self.data.response])
        if self.data.template != "chat":
            return response + (self.tokenizer.eos_token or "")
        whole = self._chat([self._question(row), {"role": "assistant", "content": response}], False)
        begun = self.prompt(row)
        if not whole.startswith(begun):
            raise ValueError(
                "data.template: expected a chat template whose prompt is the beginning of the whole conversation, got "
                f"{begun[-40:]!r} and {whole[len(begun) - 40 : len(begun) + 40]!r}"
            )
        return whole[len(begun) :]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt; a chat template writes the special tokens itself."""
        return list(self.tokenizer(text, add_special_tokens=self.data.template != "chat")["input_ids"])

    def _asked(self, row: Row) -> tuple[str, str]:
        return str(row[self.data.prompt]), str(row.get(self.data.input or "", "") or "")

    def _question(self, row: Row) -> dict[str, str]:
        prompt, more = self._asked(row)
        return {"role": "user", "content": f"{prompt}\n\n{more}" if more else prompt}

    def _chat(self, messages: list[dict[str, str]], to_go_on: bool) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_go_on))


def read_splits(data: InstructionData) -> tuple[Table, Table | None]:
    """(train, dev); dev cut off from train where none is given, None if there is to be none."""
    required, optional = [data.prompt, data.response], [data.input] if data.input else []
    train = read_table(data.train, required, optional, limit=data.max_train_rows)
    if data.dev is not None:
        return train, read_table(data.dev, required, optional)
    if not data.dev_size:
        return train, None
    kept, off = split_off(train.rows, data.dev_size, [*required, *optional])
    return Table(train.path, kept, {}), Table(train.path, off, {})


def read_test(data: InstructionData) -> list[tuple[Row, str]]:
    """Rows to answer, each with its reference.

    Raises:
        ValueError: there is no test file.
    """
    if data.test is None:
        raise ValueError("data.test: expected a file, got null")
    reference = data.answer or data.response
    table = read_table(data.test, [data.prompt, reference], [data.input] if data.input else [])
    return [(row, str(row[reference])) for row in table.rows]


def encode(table: Table, template: Template, max_length: int) -> list[dict[str, list[int]]]:
    """Token ids and labels of every row; labels of the prompt are -100.

    Prompt and response are tokenised separately, so that the prompt has the same tokens here and when generating.
    Responses are cut at `max_length`; rows whose prompt alone reaches it are left out, with a warning that counts.

    Raises:
        ValueError: no row is left.
    """
    examples, cut = [], 0
    for row in table.rows:
        prompt = template.encode_prompt(template.prompt(row))
        response = list(template.tokenizer(template.response(row), add_special_tokens=False)["input_ids"])
        if len(prompt) >= max_length or not response:
            continue
        cut += len(prompt) + len(response) > max_length
        ids = (prompt + response)[:max_length]
        examples.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    left_out = len(table) - len(examples)
    if not examples:
        raise ValueError(f"data.max_length: expected more than {max_length} tokens: no prompt of {table.path} fits")
    if left_out or cut:
        warnings.warn(
            f"{table.path}: of {len(table)} rows, {left_out} are left out (their prompts have data.max_length = "
            f"{max_length} tokens or more, or their responses none) and {cut} responses are cut",
            stacklevel=2,
        )
    return examples


class Pad:
    """A collator that pads on the right to the longest row: input_ids, attention_mask and labels [rows, tokens]."""

    def __init__(self, pad_token: int) -> None:
        self.pad_token = pad_token

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


def _fill(template: str, prompt: str, more: str) -> str:
    """The template with its two fields; other braces, and those in the prompt, stay as they are."""
    values = {"prompt": prompt, "input": more}
    return re.sub(r"\{(prompt|input)\}", lambda field: values[field[1]], template)
