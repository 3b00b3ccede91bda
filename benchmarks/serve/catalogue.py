"""A store that is filled: bytes and rate, a check of what is in it, and the time to bring one of its adapters in."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.serve.workload import BLOCK, RandomAdapters
from loraxs_ext.store import AdapterStore, Manifest, Pager, Slab

SLOTS = 256


class WrongRow(Exception):
    """What came out of the store is not what went in."""


def make_store(path: Path, manifest: Manifest, adapters: RandomAdapters) -> tuple[AdapterStore, float]:
    """A store with all of `adapters`, on the disk, and the seconds that the store itself took for it.

    The next block is drawn in another thread meanwhile; waiting for it does not count.
    """
    store = AdapterStore.create(path, manifest, sync=False)
    seconds = 0.0
    blocks = adapters.blocks()
    bar = tqdm(total=adapters.count, desc="pack", unit="adapter", disable=None if adapters.count > BLOCK else True)
    with ThreadPoolExecutor(1) as pool, bar:
        upcoming = pool.submit(next, blocks, None)
        while (rows := upcoming.result()) is not None:
            upcoming = pool.submit(next, blocks, None)
            start = time.perf_counter()
            store.put_many(rows)
            seconds += time.perf_counter() - start
            bar.update(len(rows))
        start = time.perf_counter()
        store.flush()
        seconds += time.perf_counter() - start
    return store, seconds


def measure_pack(store: AdapterStore, adapters: RandomAdapters, seconds: float | None) -> dict[str, Any]:
    """Bytes and rate of a filled store, after a look at some of its adapters.

    Args:
        store: what `make_store` made.
        adapters: what it was filled with.
        seconds: what `make_store` told; None for a store that was filled earlier.

    Raises:
        WrongRow: an adapter is missing, or has other numbers.
    """
    checked = check_rows(store, adapters)
    size = sum(file.stat().st_size for file in store.path.iterdir())
    payload = adapters.layout.size * torch.float16.itemsize
    return {
        "section": "pack",
        "adapters": len(store),
        "modules": len(adapters.layout.segments),
        "dtype": "float16",
        "numbers": adapters.layout.size,
        "bytes": size,
        "bytes_per_adapter": size / len(store),
        "over_the_numbers_alone": size / len(store) / payload,
        "seconds": seconds,
        "adapters_per_second": None if seconds is None else adapters.count / seconds,
        "bytes_per_second": None if seconds is None else size / seconds,
        "checked": {"adapters": checked},
    }


def check_rows(store: AdapterStore, adapters: RandomAdapters, blocks: int = 16, each: int = 16) -> int:
    """Compare the first, the last and some random adapters with what they were drawn as; how many.

    Raises:
        WrongRow: one is missing, or has other numbers.
    """
    if len(store) != adapters.count:
        raise WrongRow(f"expected {adapters.count} adapters in the store, got {len(store)}")
    draw = random.Random(0)
    last = (adapters.count - 1) // BLOCK
    some = {0, last, *(draw.randint(0, last) for _ in range(blocks))}
    checked = 0
    for number in sorted(some):
        numbers = adapters.block(number)
        for i in {0, len(numbers) - 1, *(draw.randrange(len(numbers)) for _ in range(each))}:
            name = adapters.name(number * BLOCK + i)
            if not torch.equal(store.row(name).numbers, numbers[i]):
                raise WrongRow(f"{name}: other numbers came out of the store than went in")
            checked += 1
    return checked


def measure_attach(store: AdapterStore, adapters: RandomAdapters, attaches: int) -> dict[str, Any]:
    """Seconds until an adapter that was in no slot is in one, for one request at a time.

    The pages of the store are in the page cache, but no adapter was asked for before by this process.

    Raises:
        WrongRow: a slot holds another adapter.
    """
    warm(store.path / "data.mdb")
    draw = random.Random(1)
    names = [adapters.name(i) for i in draw.sample(range(adapters.count), min(attaches, adapters.count))]
    slab = Slab(adapters.layout, SLOTS)
    samples, checked = [], 0
    with Pager(store, slab) as pager:
        for number, name in enumerate(names):
            start = time.perf_counter()
            lease = pager.acquire([name])
            samples.append(time.perf_counter() - start)
            if number % max(1, len(names) // 16) == 0:
                if not torch.equal(
                    slab.rows[lease.slots[0]], adapters.block(int(name[5:]) // BLOCK)[int(name[5:]) % BLOCK].float()
                ):
                    raise WrongRow(f"{name}: its slot holds other numbers")
                checked += 1
            lease.release()
        stats = pager.stats()
    if stats["misses"] != len(names):
        raise WrongRow(f"expected {len(names)} adapters that were in no slot, got {stats['misses']}")
    samples.sort()
    return {
        "section": "attach",
        "adapters": adapters.count,
        "slots": SLOTS,
        "attaches": len(names),
        "evictions": stats["evictions"],
        **{f"p{p}_ms": 1e3 * samples[min(len(samples) - 1, int(len(samples) * p / 100))] for p in (50, 90, 99)},
        "worst_ms": 1e3 * samples[-1],
        "checked": {"adapters": checked},
    }


def warm(path: Path) -> None:
    """Read the file once, so that it is in the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass
