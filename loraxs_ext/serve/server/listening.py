"""The process: it listens, and at its end takes nothing new and finishes what runs."""

from __future__ import annotations

import signal
import socket
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from .api import create_app
from .connection import Connection
from .logs import log
from .service import Service


class Server(uvicorn.Server):
    """uvicorn, which tells the service when it is asked to end.

    Args:
        service: to be served.
        host, port: to listen at; port 0 for any that is free.
        grace: seconds that running requests get at the end.
    """

    def __init__(self, service: Service, host: str, port: int, grace: int) -> None:
        self._service = service
        connection: Any = partial(Connection, seconds=service.limits.body_seconds)
        config = uvicorn.Config(
            create_app(service),
            host=host,
            port=port,
            lifespan="on",
            http=connection,
            ws="none",
            # Its access log has queries in it; ours is the guard's.
            access_log=False,
            log_config=None,
            server_header=False,
            limit_concurrency=service.limits.connections,
            timeout_graceful_shutdown=grace,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            for server in self.servers:
                for listening in server.sockets:
                    host, port = listening.getsockname()[:2]
                    log("listening", host=host, port=port, model=self._service.name)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)


def serve(service: Service, host: str, port: int, grace: int) -> int:
    """Serve until SIGTERM or SIGINT, and then until what runs is finished; the exit status."""
    server = Server(service, host, port, grace)
    # uvicorn handles a signal from when its loop runs, and raises it once more when it has ended in order: the first
    # must not be lost, and the second is no failure.
    before = {sign: signal.signal(sign, server.handle_exit) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run()
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    log("ended")
    return 0 if server.started else 1
