"""Which names an adapter may have. A name is a key in a database, never a path."""

from __future__ import annotations

import unicodedata

# LMDB's keys have up to 511 bytes; an older version's key is the name, a zero and eight bytes.
MAX_BYTES = 500


def encode_name(name: str) -> bytes:
    """The key of a name.

    Raises:
        TypeError: it is not a string.
        ValueError: it is empty, too long, or holds control characters or half a surrogate pair.
    """
    key = encode_text("name", name)
    if not 1 <= len(key) <= MAX_BYTES:
        raise ValueError(f"name: expected 1 to {MAX_BYTES} bytes of UTF-8, got {len(key)}: {name!r:.80}")
    if not name.isprintable() and any(unicodedata.category(character) == "Cc" for character in name):
        raise ValueError(f"name: expected no control characters, got {name!r:.80}")
    return key


def encode_text(argument: str, text: str) -> bytes:
    """The bytes of a name or a part of one.

    Raises:
        TypeError: it is not a string.
        ValueError: it holds half a surrogate pair.
    """
    if not isinstance(text, str):
        raise TypeError(f"{argument}: expected a string, got {text!r}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{argument}: expected text that UTF-8 can hold, got {text!r:.80}") from None
