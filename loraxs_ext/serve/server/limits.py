"""How much a request, and all of them together, may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server. What is beyond is refused with a sentence, never cut.

    Attributes:
        body: bytes of a request.
        adapter: bytes of an adapter that is put, with its configuration.
        context: tokens of a prompt and its answer together; None for what the model and the cache hold.
        choices: answers that one request may ask for, over all its prompts.
        stop: stop sequences of a request.
        queue: answers accepted and not yet finished, over all requests.
        slot_seconds: that a request may wait for a slot for its adapter.
        body_seconds: that a client may take to send a request.
        page: names of one page of the list of models.
        connections: open at the same time.

    Raises:
        ValueError: a limit is not positive.
    """

    body: int = 1 << 20
    adapter: int = 64 << 20
    context: int | None = None
    choices: int = 8
    stop: int = 4
    queue: int = 1024
    slot_seconds: float = 60.0
    body_seconds: float = 60.0
    page: int = 1000
    connections: int = 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
