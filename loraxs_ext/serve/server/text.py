"""Prompts to tokens, and tokens to text piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# What a decoder puts in the place of bytes that are not a character yet.
_UNFINISHED = "\ufffd"


class Tokens:
    """The tokenizer of a model, with errors for what clients send.

    Args:
        tokenizer: of the model.
        end: tokens that end an answer.
        size: tokens that the model has, which may be fewer than the tokenizer's; None for as many.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: Sequence[int], size: int | None = None) -> None:
        self.tokenizer, self.end = tokenizer, tuple(end)
        self._size = len(tokenizer) if size is None else min(size, len(tokenizer))

    def of_text(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that the model wants at its beginning.

        Raises:
            ValueError: it is no text that can be encoded, or empty.
        """
        return self._encode(text, "prompt", add_special_tokens=True)

    def of_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation that the model is to answer, in its chat template.

        Raises:
            ValueError: the model has no template, or it refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("messages: this model has no chat template; use /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except TemplateError as reason:
            raise ValueError(f"messages: the chat template of this model refuses them: {reason}") from None
        return self._encode(str(text), "messages", add_special_tokens=False)

    def check(self, prompt: Sequence[int]) -> list[int]:
        """A prompt that came as tokens.

        Raises:
            ValueError: it is empty, or has a token that the model does not have.
        """
        if not prompt or not all(0 <= token < self._size for token in prompt):
            raise ValueError(f"prompt: expected at least one token, each from 0 to {self._size - 1}")
        return list(prompt)

    def _encode(self, text: str, field: str, **options: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{field}: expected text that UTF-8 can hold, got half a surrogate pair") from None
        tokens: list[int] = self.tokenizer(text, **options)["input_ids"]
        if not tokens:
            raise ValueError(f"{field}: expected at least one token, got none")
        if max(tokens) >= self._size:
            raise ValueError(f"{field}: expected text of tokens that the model has, got another one")
        return tokens


class TextStream:
    """Text of tokens that come one by one, until a stop sequence; the same text in whatever portions they come.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer and are no part of it.

    Attributes:
        stopped: whether a stop sequence was found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        # Text is decoded from `_begin`, and that of the tokens before `_read` was given out: a token's text may depend
        # on the one before it.
        self._begin = self._read = 0
        # Text that may be the beginning of a stop sequence.
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that the token adds and that is certain."""
        self._tokens.append(token)
        known, text = self._decode(self._begin, self._read), self._decode(self._begin, len(self._tokens))
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return self._release(text[len(known) :])

    def flush(self) -> str:
        """What is left when no token comes any more."""
        known, text = self._decode(self._begin, self._read), self._decode(self._begin, len(self._tokens))
        self._begin = self._read = len(self._tokens)
        certain = self._release(text[len(known) :])
        rest, self._held = self._held, ""
        return certain + rest

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True))

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        # The longest end of the text that a stop sequence may begin with.
        held = 0
        for stop in self._stop:
            longest = min(len(stop) - 1, len(text))
            held = max(held, next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0))
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
