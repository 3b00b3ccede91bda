"""Replicas of one model behind Ray Serve; requests for one adapter go to the replica that has it in a slot.

    pip install "ray[serve]"
    python -m examples.ray_serve                                two replicas of a small decoder, 24 adapters, checked
    python -m examples.ray_serve --model FOLDER --store STORE   yours: POST / {"adapter", "prompt", "max_tokens"}

A replica is a model with an `AdapterPool` over the store. It batches what arrives together, whatever the adapters.
Names are hashed consistently over the replicas: an adapter has one home, where its rows stay in a slot, and moves only
if replicas come or go; a replica that is full passes its requests on to the next one on the ring.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse
from transformers import AutoModelForCausalLM, AutoTokenizer

import loraxs_ext
from examples.decoder import decoder_folder
from loraxs_ext import LoraXSConfig
from loraxs_ext.basis import Recipe
from loraxs_ext.checkpoint.model_folder import find_targets
from loraxs_ext.serve import AdapterPool
from loraxs_ext.serve.vllm.plain_lora import Bases
from loraxs_ext.store import AdapterRow, AdapterStore, Manifest, RowLayout, Segment

MOST_TOKENS, BATCH = 512, 16
ROUTER = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    request_router_kwargs={"num_fallback_replicas": 1},
)


class Ask(NamedTuple):
    """A request: adapter of the store or None for the base model, prompt, and how many tokens to generate."""

    adapter: str | None
    prompt: str
    max_tokens: int


@serve.deployment(max_ongoing_requests=4 * BATCH, request_router_config=ROUTER)
class Replica:
    """The model, its pool and its tokenizer in a process of their own."""

    def __init__(self, model: str, store: str, slots: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(model).eval()
        self._store = AdapterStore(store, readonly=True)
        self._pool = AdapterPool(self._model, self._store, slots=slots)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.02)
    async def generate(self, asks: list[Ask]) -> list[dict[str, Any]]:
        """An answer for each; one that cannot be given says why."""
        # The model is asked once for all of them, so an unknown name must not spoil it for the others.
        known = [ask for ask in asks if self._has(ask.adapter)]
        texts = iter(await asyncio.to_thread(self._answer, known) if known else [])
        here = serve.get_replica_context().replica_id.unique_id
        return [
            {"text": next(texts), "replica": here} if ask in known else {"error": f"no adapter {ask.adapter!r}"}
            for ask in asks
        ]

    def _has(self, adapter: str | None) -> bool:
        try:
            return adapter is None or adapter in self._store
        except ValueError:
            # No adapter can have such a name.
            return False

    @torch.inference_mode()
    def _answer(self, asks: Sequence[Ask]) -> list[str]:
        inputs = self._tokenizer([ask.prompt for ask in asks], return_tensors="pt", padding=True)
        longest = max(ask.max_tokens for ask in asks)
        with loraxs_ext.adapters(self._model, [ask.adapter for ask in asks]):
            tokens = self._model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [
            self._tokenizer.decode(row[: ask.max_tokens], skip_special_tokens=True)
            for ask, row in zip(asks, new, strict=True)
        ]


@serve.deployment
class Front:
    """Takes HTTP requests and sends each to the home of its adapter."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            ask = read(await request.body())
        except ValueError as reason:
            return JSONResponse({"error": str(reason)}, 400)
        home = self._replicas.options(session_id=ask.adapter) if ask.adapter else self._replicas
        answer = await home.generate.remote(ask)
        return JSONResponse(answer, 404 if "error" in answer else 200)


def read(body: bytes) -> Ask:
    """The request in a body.

    Raises:
        ValueError: it is none; says what was expected.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError("body: expected a JSON object")
    adapter, prompt, tokens = fields.get("adapter"), fields.get("prompt"), fields.get("max_tokens", 32)
    if adapter is not None and not (isinstance(adapter, str) and adapter):
        raise ValueError(f"adapter: expected a name or null, got {adapter!r:.80}")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt: expected text, got {prompt!r:.80}")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"max_tokens: expected 1 to {MOST_TOKENS}, got {tokens!r:.80}")
    return Ask(adapter, prompt, tokens)


def application(model: Path, store: Path, *, replicas: int = 2, slots: int = 256) -> Any:
    """What `serve.run` takes."""
    home = Replica.options(num_replicas=replicas).bind(str(model), str(store), slots)
    return Front.bind(home)


def random_store(model: Path, path: Path, count: int, rank: int = 8) -> None:
    """A store of adapters that each change the model in another way, and know nothing."""
    keys = [target.key for target in find_targets(model, LoraXSConfig(r=rank, target_modules="all-linear"))]
    recipe = Recipe()
    _, sketches = Bases(model).get(dict.fromkeys(keys, rank), recipe)
    layout = RowLayout(Segment(key, rank) for key in keys)
    numbers = 0.1 * torch.randn(count, layout.size, generator=torch.Generator().manual_seed(0))
    with AdapterStore.create(
        path, Manifest("", recipe.to_dict(), {"peft_type": "LORAXS", "r": rank}, sketches)
    ) as store:
        store.put_many([AdapterRow(f"user{i}", 0, layout, numbers[i]) for i in range(count)])


def post(address: str, ask: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and answer."""
    request = urllib.request.Request(address, json.dumps(ask).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def demonstrate(address: str, model: Path, store: Path, adapters: int, rounds: int = 2, tokens: int = 8) -> None:
    """Ask for every adapter several times, all at once, and check homes and answers.

    Raises:
        SystemExit: an adapter had two homes, a replica had nothing to do, or an answer is not that of the adapter.
    """
    names = [None, *(f"user{i}" for i in range(adapters))]
    asks = [{"adapter": name, "prompt": "The sea is", "max_tokens": tokens} for name in names * rounds]
    with ThreadPoolExecutor(len(asks)) as threads:
        replies = list(threads.map(lambda ask: post(address, ask), asks))
    homes: dict[str | None, set[str]] = {name: set() for name in names}
    texts: dict[str | None, set[str]] = {name: set() for name in names}
    for ask, (status, answer) in zip(asks, replies, strict=True):
        if status != 200:
            raise SystemExit(f"{ask}: {status} {answer}")
        homes[ask["adapter"]].add(answer["replica"])
        texts[ask["adapter"]].add(answer["text"])
    used = sorted(set().union(*(homes[name] for name in names if name)))
    for replica in used:
        print(f"replica {replica}: home of {', '.join(name for name in names if name and replica in homes[name])}")
    if len(used) < 2 or any(len(homes[name]) > 1 for name in names if name):
        raise SystemExit(f"expected one home for each adapter, and adapters on every replica, got {homes}")
    local = Replica.func_or_class(str(model), str(store), adapters)
    for name in names:
        alone = local._answer([Ask(name, "The sea is", tokens)])[0]
        if texts[name] != {alone}:
            raise SystemExit(f"{name}: expected {alone!r} as alone, got {texts[name]}")
    print(f"{len(asks)} answers, each that of its adapter alone; the base says{texts[None].pop()!r}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the base model; default: a small decoder")
    parser.add_argument("--store", type=Path, help="adapter store; without it, random adapters are asked and checked")
    parser.add_argument("--replicas", type=int, default=2, help="default %(default)s")
    parser.add_argument("--slots", type=int, default=256, help="of each replica, default %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1, default %(default)s")
    parser.add_argument("--adapters", type=int, default=24, help="random ones, default %(default)s")
    arguments = parser.parse_args(argv)
    model = arguments.model or decoder_folder()
    # A replica of the demonstration waits more than it computes; one core for each is not asked for.
    ray.init(num_cpus=arguments.replicas + 2, include_dashboard=False, ignore_reinit_error=True)
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    with tempfile.TemporaryDirectory() as folder:
        store = arguments.store or Path(folder) / "store"
        if arguments.store is None:
            random_store(model, store, arguments.adapters)
        app = application(model, store, replicas=arguments.replicas, slots=arguments.slots)
        try:
            serve.run(app, blocking=arguments.store is not None)
            demonstrate(f"http://127.0.0.1:{arguments.port}/", model, store, arguments.adapters)
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
