"""A plugin for vLLM: adapters become models of its server, made plain LoRA when they are first asked for.

vLLM loads `register` through its entry points "vllm.general_plugins" in every process of the engine. What it leaves to
a resolver is one question per name, in the process of the server; `vllm_guard` does the rest. Importing this module
does not import vLLM.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loraxs_ext.basis.cache import cache_directory

from .cpu import skip_rows_without_adapter
from .folder_cache import FolderCache
from .plain_lora import Bases, digest, write
from .sources import Adapters, open_adapters

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NAME = "loraxs"
ADAPTERS, BASIS = "LORAXS_VLLM_ADAPTERS", "LORAXS_VLLM_BASIS"
CACHE, CACHE_GB, _DEFAULT_GB = "LORAXS_VLLM_CACHE", "LORAXS_VLLM_CACHE_GB", "16"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the environment says.

    Attributes:
        adapters: an adapter store, or a folder of folders of adapters.
        basis: file of `loraxs init --output`; None to take the bases from the cache, or compute them.
        cache: folder of the plain LoRAs.
        limit: bytes that they may take.
    """

    adapters: Path
    basis: Path | None
    cache: Path
    limit: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings | None:
        """None if no adapters are named.

        Raises:
            ValueError: a variable cannot be understood.
        """
        if not environment.get(ADAPTERS):
            return None
        text = environment.get(CACHE_GB, _DEFAULT_GB)
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = math.nan
        if not 0 <= gigabytes < math.inf:
            raise ValueError(f"{CACHE_GB}: expected a number of gigabytes, got {text!r}")
        default = cache_directory("default")
        assert default is not None  # only None as a choice gives none
        basis, cache = environment.get(BASIS), environment.get(CACHE)
        return cls(
            adapters=Path(environment[ADAPTERS]),
            basis=Path(basis) if basis else None,
            cache=Path(cache) if cache else default / "vllm",
            limit=int(gigabytes * (1 << 30)),
        )


def register() -> None:
    """Register the resolver with vLLM, in any of its processes; nothing is opened before the first request."""
    settings = Settings.read(os.environ)
    if settings is None:
        _log.info("%s is not set: no LoRA-XS adapters are served", ADAPTERS)
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    skip_rows_without_adapter()
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolver.register(AdapterResolver)
        LoRAResolverRegistry.register_resolver(NAME, AdapterResolver(settings))


class Held(NamedTuple):
    """An adapter whose files stay as long as `release` is not called.

    Attributes:
        folder: of the plain LoRA.
        number: positive, stable, and another one for another content or name.
        release: may be called once, from any thread.
    """

    folder: Path
    number: int
    release: Callable[[], None]


class AdapterResolver:
    """Answers vLLM's question for a name with the folder of a plain LoRA. Safe for threads; one for a process.

    Args:
        settings: where everything is.

    Attributes:
        guarded: whether a `RequestGuard` holds what requests use. If not, the files of every answer stay until the
            process ends, whatever the limit of the cache, for vLLM may read them again at any time.
        max_rank: of what vLLM was started with; None if not known.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.guarded = False
        self.max_rank: int | None = None
        self._cache = FolderCache(settings.cache, settings.limit)
        self._opening = threading.Lock()
        self._adapters: Adapters | None = None
        self._bases: dict[str, Bases] = {}
        self._kept: dict[Path, Held] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter as vLLM asks for it; None if there is none.

        Args:
            base_model_name: folder or name of the base.
            lora_name: as the request gives it.

        Raises:
            ValueError: the adapter is there but cannot be served; says why.
        """
        from vllm.lora.request import LoRARequest

        held = await asyncio.to_thread(self.hold, base_model_name, lora_name)
        if held is None:
            return None
        if self.guarded or held.folder in self._kept:
            held.release()
        else:
            self._kept[held.folder] = held
        return LoRARequest(lora_name=lora_name, lora_int_id=held.number, lora_path=str(held.folder))

    def hold(self, base_model: str, name: str) -> Held | None:
        """The adapter as it is now, made plain LoRA if it is not yet; None if there is none.

        Raises:
            ValueError: as `resolve_lora`.
        """
        adapters, bases = self._open(base_model)
        found = adapters.find(name)
        if found is None:
            return None
        rank = found.row.layout.rank
        if self.max_rank is not None and rank > self.max_rank:
            raise ValueError(
                f"adapter {name!r}: expected a rank of at most {self.max_rank}, got {rank}; start vLLM with "
                f"--max-lora-rank {rank} or larger"
            )
        content = digest(found, bases)
        stack = ExitStack()
        folder = stack.enter_context(self._cache.hold(content, partial(write, found, bases, base_model=base_model)))
        number = hashlib.blake2b(f"{content} {name}".encode(), digest_size=8)
        return Held(folder, int.from_bytes(number.digest(), "little") >> 2 or 1, stack.close)

    def owns(self, path: str) -> bool:
        """Whether a path is that of a plain LoRA of this resolver."""
        return Path(path).parent == self._cache.root

    def _open(self, base_model: str) -> tuple[Adapters, Bases]:
        with self._opening:
            if self._adapters is None:
                self._adapters = open_adapters(self.settings.adapters)
            if base_model not in self._bases:
                self._bases[base_model] = Bases(Path(base_model), self.settings.basis)
            return self._adapters, self._bases[base_model]
