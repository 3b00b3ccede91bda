"""What clients may ask for: the part of OpenAI's API that this server does. What it does not do is refused by name."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ApiError
from .sampling import Sampling

# Fields of OpenAI's API with the values that ask for nothing; all others are refused. None always does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "functions": ([],),
    "tools": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
}
# Fields that may be one of several things, where pydantic would only speak of one.
_EITHER = {
    "prompt": "expected a text, tokens, or a list of either",
    "stop": "expected a text or a list of texts",
    "content": "expected a text or a list of parts",
}
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Text = Annotated[str, Field(max_length=1 << 30)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]


class StreamOptions(BaseModel):
    """What else a stream tells."""

    model_config = _STRICT
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of requests may say."""

    model_config = _STRICT
    model: str
    max_tokens: Count | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=1 << 31)
    n: Count = 1
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if value is not None and not any(_same(value, neutral) for neutral in _NEUTRAL.get(name, ()))
        }

    @model_validator(mode="after")
    def _check(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected stream to be true with it")
        return self

    @property
    def stops(self) -> list[str]:
        """Stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def samplings(self, count: int) -> list[Sampling]:
        """How each of `count` answers is sampled."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return [Sampling(self.temperature, self.top_p, self.top_k, seed + i) for i in range(count)]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    """Body of /v1/completions."""

    prompt: Text | list[Token] | list[Text] | list[list[Token]]

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt, as text or as tokens."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class Part(BaseModel):
    """A part of a message."""

    model_config = _STRICT
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a conversation."""

    model_config = _STRICT
    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]

    def plain(self) -> dict[str, str]:
        """The message with its content as one text."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "".join(parts)}


class ChatRequest(Request):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None


Body = TypeVar("Body", bound=Request)


def parse(kind: type[Body], body: bytes) -> Body:
    """The request in a body.

    Raises:
        ApiError: 422, with what is wrong.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(422, "body: expected JSON, got something else", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(422, "body: expected a JSON object", code="invalid_json")
    try:
        return kind.model_validate(values)
    except ValidationError as reason:
        # What came is left out: it may be a prompt.
        first = reason.errors(include_url=False, include_input=False, include_context=False)[0]
        place = _place(first["loc"])
        field = ".".join(ascii(part)[1:-1][:80] if isinstance(part, str) else str(part) for part in place)
        if first["type"] == "extra_forbidden":
            message = f"{field}: this server does not support it"
        elif len(place) < len(first["loc"]):
            message = f"{field}: {_EITHER[str(place[-1])]}"
        else:
            message = f"{field}: {first['msg']}" if field else first["msg"].removeprefix("Value error, ")
        raise ApiError(422, message, param=field or None, code="invalid_value") from None


def _place(location: Sequence[int | str]) -> Sequence[int | str]:
    """Where an error is, without what pydantic calls the alternatives of a field that may be several things."""
    ends = (i + 1 for i, part in enumerate(location) if part in _EITHER)
    return location[: next(ends, None)]


def _same(value: Any, neutral: Any) -> bool:
    # 0 == False, but logprobs=0 asks for something.
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
