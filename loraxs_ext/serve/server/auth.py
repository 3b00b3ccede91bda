"""Keys of clients and of the administrator, which come from files or variables and are never shown."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path

# Longer files are something else.
_MOST_BYTES = 1 << 20
_SHORTEST = 16


class Keys:
    """Keys of which any one will do.

    Args:
        keys: at least 16 printable ASCII characters each.
        source: file or variable they come from, for the message.

    Raises:
        ValueError: one is shorter or has other characters; the message does not show it.
    """

    def __init__(self, keys: Sequence[str] = (), source: str = "keys") -> None:
        for index, key in enumerate(keys):
            if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"{source}, key {index + 1}: expected at least {_SHORTEST} printable ASCII characters without "
                    f"spaces, got {len(key)} characters"
                )
        self._keys = tuple(key.encode() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"Keys({len(self._keys)})"

    def accept(self, authorization: bytes | None) -> bool:
        """Whether a header `Authorization: Bearer KEY` has one of the keys."""
        scheme, _, given = (authorization or b"").partition(b" ")
        # All are compared, so that the time does not tell which.
        matches = [hmac.compare_digest(key, given.strip()) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def read_keys(file: Path | None, variable: str, environment: Mapping[str, str]) -> Keys:
    """Keys from a file with one in each line, or else from a variable.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no keys, or they are too short.
    """
    if file is None:
        value = environment.get(variable, "")
        return Keys([value] if value else [], variable)
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{file}: expected keys, one a line, got {size} bytes")
    keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"{file}: expected at least one key, got none")
    return Keys(keys, str(file))


def check_binding(host: str, keys: Keys) -> None:
    """Raise ValueError if whoever reaches this machine could use the server without a key."""
    if not keys and not is_loopback(host):
        raise ValueError(
            f"--host: expected a loopback address such as 127.0.0.1 for a server without API keys, got {host!r}; "
            f"give keys by --api-key-file or LORAXS_API_KEY"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
