"""From a model, its tokenizer and a store to a service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedTokenizerBase

from loraxs_ext.store import AdapterStore

from ..pool import AdapterPool
from .auth import Keys
from .engine import Engine
from .limits import Limits
from .service import Service
from .text import Tokens


@contextmanager
def build(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    store: AdapterStore,
    *,
    name: str,
    limits: Limits,
    slots: int = 256,
    rank: int | None = None,
    cache_tokens: int | None = None,
    batch_tokens: int | None = None,
    api_keys: Keys | None = None,
    admin_keys: Keys | None = None,
) -> Iterator[Service]:
    """A service, whose pool is in the model until the context ends.

    Args:
        model: a causal transformers model, on its device, in eval mode.
        tokenizer: of the model.
        store: of adapters of the model; written to only by the administrator.
        name: of the base model towards clients.
        limits: on requests.
        slots, rank: of the `AdapterPool`.
        cache_tokens, batch_tokens: of the `Engine`.
        api_keys, admin_keys: None for none; see `Service`.

    Raises:
        ValueError: the store is that of another model; or the name is empty.
    """
    if not name:
        raise ValueError("name: expected a name for the base model, got none")
    with AdapterPool(model, store, slots=slots, rank=rank) as pool:
        engine = Engine(pool, limits, cache_tokens=cache_tokens, batch_tokens=batch_tokens)
        embeddings = pool.model.get_input_embeddings()  # type: ignore[operator]
        tokens = Tokens(tokenizer, _end_tokens(pool.model, tokenizer), embeddings.num_embeddings)
        yield Service(name, engine, tokens, store, limits, api_keys or Keys(), admin_keys or Keys())


def _end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: what the model's generation configuration says, or else its tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return []
    return [configured] if isinstance(configured, int) else list(configured)
