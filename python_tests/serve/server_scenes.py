"""A server of a tiny model over HTTP, beside the PEFT model whose adapters are in its store."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lmdb")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("uvicorn")

from openai import APIError as APIError
from openai import InternalServerError as InternalServerError
from openai import NotFoundError as NotFoundError
from openai import OpenAI

from loraxs_ext.checkpoint.packing import manifest_of, pack
from loraxs_ext.serve.server.auth import Keys
from loraxs_ext.serve.server.building import build
from loraxs_ext.serve.server.limits import Limits
from loraxs_ext.serve.server.listening import Server
from loraxs_ext.serve.server.service import Service
from loraxs_ext.store import AdapterStore

from ..peft.models import CASES, VOCABULARY

# A name is a key, whatever it looks like.
ADAPTERS = {"alice": 1, "team/bob": 2, "../../etc/passwd": 3}
API_KEY, ADMIN_KEY = "client-key-0123456789", "admin-key-0123456789"
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}word9"


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of word2, word3, …"""
    vocabulary = {"<pad>": 0, "<unk>": 1, **{f"word{i}": i for i in range(2, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE)


@dataclass
class Site:
    """What a server is made of.

    Attributes:
        model: folder of the base model and its tokenizer.
        store: folder of the store.
        folders: by adapter, as PEFT saved it; "spare" and "other" are not in the store.
        oracle: PEFT model with all of them.
    """

    model: Path
    store: Path
    folders: dict[str, Path]
    oracle: PeftModel

    def alone(self, adapter: str | None, prompt: list[int], tokens: int) -> list[int]:
        """Greedy tokens of this adapter in a model that serves nothing else."""
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        if adapter is None:
            with self.oracle.disable_adapter():
                out = self.oracle.generate(input_ids=ids, **options)
        else:
            self.oracle.set_adapter(_key(adapter))
            out = self.oracle.generate(input_ids=ids, **options)
        return out[0, len(prompt) :].tolist()

    def text(self, adapter: str | None, prompt: str, tokens: int) -> str:
        """The same, from text to text."""
        ids = [int(word.removeprefix("word")) for word in prompt.split()]
        return tokenizer().decode(self.alone(adapter, ids, tokens), skip_special_tokens=True)


def make_site(folder: Path) -> Site:
    """A model, adapters and a store in a folder."""
    case = CASES["llama"]
    case.base().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    seeds = {**ADAPTERS, "spare": 4, "other": 5}
    oracle = case.model(init_seed=0)
    for name, seed in seeds.items():
        oracle.add_adapter(_key(name), case.config(init_seed=seed, lora_alpha=8))
    oracle.eval()
    oracle.save_pretrained(str(folder / "adapters"), selected_adapters=[_key(name) for name in seeds])
    folders = {name: folder / "adapters" / _key(name) for name in seeds}
    store = folder / "store"
    with AdapterStore.create(store, manifest_of(folders["alice"])) as opened:
        assert {one.outcome for one in pack(opened, {name: folders[name] for name in ADAPTERS})} == {"added"}
    return Site(folder / "model", store, folders, oracle)


def model_of(adapter: str | None) -> str:
    """What a client calls an adapter."""
    return "tiny" if adapter is None else f"tiny:{adapter}"


def _key(name: str) -> str:
    """A name for PEFT's dictionaries of modules, which take no dots."""
    return f"seed{name.encode().hex()}"


@dataclass
class Running:
    """A server in a thread.

    Attributes:
        service: that it serves.
        url: of its root.
        stop: ask it to end.
    """

    service: Service
    url: str
    stop: Callable[[], None] = lambda: None

    def client(self, key: str = API_KEY, **options) -> OpenAI:
        """A client that neither repeats requests nor waits for ever."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **options})


@contextmanager
def built(site: Site, *, limits: Limits | None = None, keys: bool = True, **options) -> Iterator[Service]:
    """What a server of a site serves, until the context ends."""
    with AdapterStore(site.store) as store:
        base = type(site.oracle.get_base_model()).from_pretrained(site.model).eval()
        settings = {"slots": 3, "cache_tokens": 2048, "batch_tokens": 64, **options}
        if keys:
            settings |= {"api_keys": Keys([API_KEY]), "admin_keys": Keys([ADMIN_KEY])}
        with build(base, tokenizer(), store, name="tiny", limits=limits or Limits(), **settings) as service:
            yield service


@contextmanager
def running(site: Site, *, grace: int = 10, **options) -> Iterator[Running]:
    """A server of a site, until the context ends; options as for `built`."""
    with built(site, **options) as service:
        server = Server(service, "127.0.0.1", 0, grace)
        thread = threading.Thread(target=server.run)

        def stop() -> None:
            server.handle_exit(signal.SIGTERM, None)

        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield Running(service, f"http://127.0.0.1:{port}", stop)
        finally:
            stop()
            thread.join()


def send(server: Running, method: str, path: str, body=None, key: str = API_KEY, **headers):
    """Status, headers and JSON (or text) of one request, sent as it is."""
    address = urlparse(server.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **headers}
    try:
        connection.request(method, path, body, {name: value for name, value in given.items() if value is not None})
        response = connection.getresponse()
        text = response.read()
        return response.status, response.headers, json.loads(text) if text[:1] == b"{" else text.decode()
    finally:
        connection.close()


def put(server: Running, path: str, files: dict[str, bytes], key: str = ADMIN_KEY):
    """Send files in a form, as `curl -F` does."""
    mark = "----a-line-that-is-in-no-file"
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{field}"; filename="{field}"\r\n\r\n'.encode() + content
        for field, content in files.items()
    ]
    body = b"\r\n".join([*parts, f"--{mark}--\r\n".encode()])
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    return send(server, "PUT", f"/admin/adapters/{path}", body, key, **headers)


def files_of(folder: Path) -> dict[str, bytes]:
    """What `put` sends of a folder that PEFT saved."""
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    return {field: (folder / name).read_bytes() for field, name in names.items()}
