"""From a request to its answers: prompts are checked and submitted, and tokens become OpenAI's objects."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from .engine import Generation, QueueFullError, UnavailableError
from .errors import ApiError, retry, unknown_model
from .protocol import ChatRequest, CompletionRequest
from .service import Service, busy
from .text import TextStream

# Tokens of an answer whose request does not say how many, as in OpenAI's API.
_COMPLETION_TOKENS = 16


class Choice:
    """One answer.

    Attributes:
        index: among the answers of its request.
        tokens: computed so far.
        finish: why it ended, "stop" or "length"; None while it goes on.
    """

    def __init__(self, index: int, generation: Generation, text: TextStream, service: Service, streaming: bool) -> None:
        self.index, self.generation, self._streaming = index, generation, streaming
        self.tokens = 0
        self.finish: str | None = None
        self._text, self._service, self._start = text, service, time.perf_counter()

    async def pieces(self) -> AsyncIterator[str]:
        """Its text, as it comes."""
        metrics = self._service.metrics
        async for tokens in self.generation:
            if self._streaming and not self.tokens:
                metrics.first_token(time.perf_counter() - self._start)
            self.tokens += len(tokens)
            metrics.tokens(len(tokens))
            piece = "".join(map(self._push, tokens))
            if piece:
                yield piece
            if self._text.stopped:
                # What the engine has computed beyond the stop sequence is not waited for.
                self.generation.cancel()
                break
        rest = self._text.flush()
        if self._text.stopped:
            self.finish = "stop"
        self.finish = self.finish or "length"
        # Otherwise the client went away.
        if self.generation.ended or self._text.stopped:
            metrics.finished(time.perf_counter() - self._start)
        if rest:
            yield rest

    def _push(self, token: int) -> str:
        if token in self._service.tokens.end:
            self.finish = "stop"
            return ""
        return self._text.push(token)


class Answers:
    """The answers of one request.

    Attributes:
        choices: each prompt's, one after the other.
        adapter: that they come from; None for the base model.
        prompt_tokens: of all prompts.
    """

    def __init__(self, service: Service, request: ChatRequest | CompletionRequest, id: str) -> None:
        self.service, self.request = service, request
        self.chat = isinstance(request, ChatRequest)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{id}"
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.prompt_tokens = 0
        self.adapter: str | None = None

    async def start(self) -> None:
        """Check the request and submit it.

        Raises:
            ApiError: it cannot be answered.
        """
        request, limits = self.request, self.service.limits
        if not self.service.ready:
            raise busy()
        self.adapter = self.service.adapter_of(request.model)
        stops = request.stops
        if len(stops) > limits.stop or not all(stops):
            raise _invalid(f"stop: expected at most {limits.stop} texts, none of them empty", "stop")
        count = 1 if isinstance(request, ChatRequest) else len(request.prompts)
        if count * request.n > limits.choices:
            raise _invalid(f"n: expected at most {limits.choices} answers of a request, got {count * request.n}", "n")
        # Tokenising a long prompt takes time that other requests should not wait for.
        prompts = await asyncio.to_thread(self._prompts)
        lengths = [self._length(prompt) for prompt in prompts]
        samplings = request.samplings(len(prompts) * request.n)
        # An answer that is wanted whole is handed over whole, unless its text may end it.
        streaming = request.stream or bool(stops)
        end = self.service.tokens.end
        try:
            for index, sampling in enumerate(samplings):
                prompt, length = prompts[index // request.n], lengths[index // request.n]
                generation = await self._submit(prompt, sampling, length, end, streaming)
                text = TextStream(self.service.tokens.tokenizer, stops)
                self.choices.append(Choice(index, generation, text, self.service, streaming))
        except BaseException:
            self.cancel()
            raise
        self.prompt_tokens = sum(map(len, prompts))
        self.service.metrics.prompt(self.prompt_tokens)

    def cancel(self) -> None:
        """Compute no more for this request."""
        for choice in self.choices:
            choice.generation.cancel()

    async def whole(self) -> dict[str, Any]:
        """All answers, when they are finished.

        Raises:
            ApiError: the engine stopped.
        """
        try:
            texts = await asyncio.gather(*map(_collect, self.choices))
        except UnavailableError as reason:
            raise busy() from reason
        finally:
            self.cancel()
        choices = []
        for choice, text in zip(self.choices, texts, strict=True):
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": choice.index, **content, "logprobs": None, "finish_reason": choice.finish})
        return self._object("chat.completion" if self.chat else "text_completion", choices, self.usage())

    async def events(self) -> AsyncIterator[bytes]:
        """All answers as server-sent events, as they come."""
        items: asyncio.Queue[tuple[Choice, str | Exception | None]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(choice, items.put_nowait)) for choice in self.choices]
        try:
            if self.chat:
                for choice in self.choices:
                    yield self._chunk(choice, {"role": "assistant", "content": ""})
            left = len(pumps)
            while left:
                choice, item = await items.get()
                if isinstance(item, Exception):
                    yield _event(busy().body())
                    return
                if item is None:
                    left -= 1
                    yield self._chunk(choice, {} if self.chat else "")
                else:
                    yield self._chunk(choice, {"content": item} if self.chat else item, going_on=True)
            if self.request.include_usage:
                yield _event(self._object(self._kind, [], self.usage()))
            yield b"data: [DONE]\n\n"
        finally:
            self.cancel()
            for pump in pumps:
                pump.cancel()

    def usage(self) -> dict[str, int]:
        """Tokens of prompts and answers."""
        completion = sum(choice.tokens for choice in self.choices)
        total = self.prompt_tokens + completion
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion, "total_tokens": total}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, choice: Choice, content: Any, going_on: bool = False) -> bytes:
        about = {"delta": content} if self.chat else {"text": content}
        begins = self.chat and "role" in content
        finish = None if going_on or begins else choice.finish
        return _event(
            self._object(
                self._kind, [{"index": choice.index, **about, "logprobs": None, "finish_reason": finish}], None
            )
        )

    def _object(self, kind: str, choices: list[Any], usage: dict[str, int] | None) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}
        return {**about, "choices": choices, **({} if usage is None else {"usage": usage})}

    def _prompts(self) -> list[list[int]]:
        tokens = self.service.tokens
        try:
            if isinstance(self.request, ChatRequest):
                return [tokens.of_messages([message.plain() for message in self.request.messages])]
            prompts = self.request.prompts
            found = [tokens.of_text(p) if isinstance(p, str) else tokens.check(p) for p in prompts]
        except ValueError as reason:
            raise _invalid(str(reason), "messages" if self.chat else "prompt") from None
        if not found:
            raise _invalid("prompt: expected at least one, got none", "prompt")
        return found

    def _length(self, prompt: Sequence[int]) -> int:
        """How many tokens the answer to a prompt may have."""
        request, context = self.request, self.service.engine.context
        wanted = request.max_tokens
        if isinstance(request, ChatRequest):
            wanted = request.max_completion_tokens or wanted
        elif wanted is None:
            wanted = _COMPLETION_TOKENS
        if wanted is None:
            wanted = max(1, context - len(prompt))
        if len(prompt) + wanted > context:
            raise ApiError(
                422,
                f"max_tokens: expected at most {context} tokens of prompt and answer together, got {len(prompt)} + "
                f"{wanted}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return wanted

    async def _submit(
        self, prompt: Sequence[int], sampling: Any, length: int, end: Sequence[int], streaming: bool
    ) -> Generation:
        engine = self.service.engine
        try:
            return await engine.submit(prompt, self.adapter, sampling, length, end, streaming=streaming)
        except KeyError:
            raise unknown_model(self.request.model) from None
        except QueueFullError as reason:
            raise retry(429, f"too many requests: {reason}", "queue_full") from None
        except TimeoutError:
            raise retry(503, "no slot came free for the adapter in time", "no_slot") from None
        except UnavailableError:
            raise busy() from None
        except RuntimeError as reason:
            raise ApiError(500, "the adapter could not be loaded", code="adapter_damaged") from reason


async def _collect(choice: Choice) -> str:
    return "".join([piece async for piece in choice.pieces()])


async def _pump(choice: Choice, put: Callable[[tuple[Choice, str | Exception | None]], None]) -> None:
    try:
        async for piece in choice.pieces():
            put((choice, piece))
        put((choice, None))
    except UnavailableError as reason:
        put((choice, reason))


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(422, message, param=param, code="invalid_value")
