"""Logs of one JSON object a line, without prompts, answers and keys."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

import transformers

logger = logging.getLogger("loraxs.serve")


class JsonFormatter(logging.Formatter):
    """A line of JSON. Of an exception, its type and where it happened: its message may quote what a client sent."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            frames = traceback.extract_tb(record.exc_info[2])
            line["exception"] = record.exc_info[0].__name__
            line["where"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line)


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Write a line about an event."""
    logger.log(level, event, extra={"fields": fields})


def set_up(stream: TextIO = sys.stderr) -> None:
    """Send all logs of this process to a stream, a JSON object a line."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    # Its warnings quote the tokens of requests.
    transformers.logging.set_verbosity_error()
