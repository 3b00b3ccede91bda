"""Adapters are added, replaced and deleted over HTTP while others, and they themselves, are served."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraxs_ext.serve.server.limits import Limits

from .server_scenes import ADMIN_KEY, API_KEY, NotFoundError, Running, Site, files_of, make_site, put, running, send

PROMPT = "word5 word6 word7"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def server(site):
    with running(site, limits=Limits(adapter=1 << 18)) as server:
        yield server


def change(server: Running, adapter: str, folder: Path, query: str = "") -> int:
    """Put an adapter; its version."""
    status, _, answer = put(server, quote(adapter, safe="") + query, files_of(folder))
    assert status == (201 if answer["version"] == 1 else 200) and answer["id"] == f"tiny:{adapter}"
    return answer["version"]


def delete(server: Running, path: str, key: str = ADMIN_KEY) -> int:
    """The status of a request to delete."""
    return send(server, "DELETE", f"/admin/adapters/{path}", key=key)[0]


def ask(server: Running, adapter: str, tokens: int = 8) -> str:
    options = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    return server.client().completions.create(model=f"tiny:{adapter}", **options).choices[0].text


def test_an_adapter_is_added_replaced_and_deleted(site: Site, server: Running):
    name = "a b/ü?%2e%2e/../c"
    with pytest.raises(NotFoundError):
        ask(server, name)
    assert change(server, name, site.folders["spare"]) == 1
    assert ask(server, name) == site.text("spare", PROMPT, 8)
    assert name in list(server.service.store)
    assert change(server, name, site.folders["other"]) == 2
    assert ask(server, name) == site.text("other", PROMPT, 8) != site.text("spare", PROMPT, 8)
    assert delete(server, quote(name, safe="")) == 200
    with pytest.raises(NotFoundError):
        ask(server, name)
    assert delete(server, quote(name, safe="")) == 404


def test_versions_are_compared(site: Site, server: Running):
    folder = site.folders["spare"]
    assert change(server, "once", folder, "?expected_version=0") == 1
    status, _, body = put(server, "once?expected_version=0", files_of(folder))
    assert status == 409 and "the adapter is at 1" in body["error"]["message"]
    assert delete(server, "once?expected_version=7") == 409
    assert put(server, "once?expected_version=-1", files_of(folder))[0] == 422
    assert delete(server, "once?expected_version=1") == 200


def test_what_runs_is_finished_with_the_adapter_it_began_with(site: Site, server: Running):
    change(server, "changing", site.folders["spare"])
    options = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "stream": True}
    stream = iter(server.client().completions.create(model="tiny:changing", **options))
    texts = [next(stream).choices[0].text]
    change(server, "changing", site.folders["other"])
    assert ask(server, "changing") == site.text("other", PROMPT, 8)
    assert delete(server, "changing") == 200
    texts += [chunk.choices[0].text for chunk in stream]
    assert "".join(texts) == site.text("spare", PROMPT, 300)


def test_changes_under_load(site: Site, server: Running):
    """An adapter that is replaced all the time says what one of its versions says, the others what they always say."""
    expected = {name: site.text(name, PROMPT, 8) for name in site.folders}
    change(server, "moving", site.folders["spare"])
    stop = threading.Event()

    def go_on() -> int:
        rounds = 0
        while not stop.is_set():
            change(server, "moving", site.folders["other" if rounds % 2 == 0 else "spare"])
            change(server, f"short-{rounds}", site.folders["spare"])
            assert delete(server, f"short-{rounds}") == 200
            rounds += 1
        return rounds

    with ThreadPoolExecutor(9) as threads:
        changing = threads.submit(go_on)
        names = ["moving", "alice", "team/bob", "moving"] * 12
        texts = list(threads.map(lambda name: ask(server, name), names))
        stop.set()
        assert changing.result() >= 2
    for name, text in zip(names, texts, strict=True):
        assert text in ({expected["spare"], expected["other"]} if name == "moving" else {expected[name]})
    assert delete(server, "moving") == 200


@pytest.mark.parametrize("key", [API_KEY, "", ADMIN_KEY[:-1]])
def test_only_the_administrator_may_change_adapters(site: Site, server: Running, key):
    assert put(server, "mine", files_of(site.folders["spare"]), key)[0] == 401
    assert delete(server, "alice", key) == 401
    assert "mine" not in server.service.store and "alice" in server.service.store


def test_without_a_key_of_the_administrator_there_is_none(tmp_path, site: Site):
    shutil.copytree(site.store, tmp_path / "store")
    with running(replace(site, store=tmp_path / "store"), keys=False) as server:
        assert delete(server, "alice", "") == 403 and "alice" in server.service.store
        assert send(server, "GET", "/v1/models", key="")[0] == 200


def damaged(folder: Path, tensors=None, config=None) -> dict:
    """The files of an adapter with other tensors or other fields."""
    found = files_of(folder)
    if config is not None:
        changed = {**json.loads(found["config"]), **config}
        found["config"] = json.dumps(changed).encode()
    if tensors is not None:
        path = folder.parent / "damaged.safetensors"
        save_file(tensors(load_file(folder / "adapter_model.safetensors")), path)
        found["weights"] = path.read_bytes()
    return found


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        (lambda f: {"weights": files_of(f)["weights"]}, 422, "config: expected a file"),
        (lambda f: {**files_of(f), "more": b""}, 400, "files"),
        (lambda f: {**files_of(f), "weights": b"\0" * 100}, 422, "expected a whole safetensors file"),
        (lambda f: {**files_of(f), "weights": b"\xff" * 8 + b"{}"}, 422, "expected a whole safetensors file"),
        (lambda f: {**files_of(f), "weights": files_of(f)["weights"][:-9]}, 422, "whole safetensors file"),
        (lambda f: {**files_of(f), "weights": b"a" * (1 << 18)}, 413, "body: expected at most"),
        (lambda f: {**files_of(f), "config": b"{"}, 422, "adapter_config.json: expected"),
        (lambda f: {**files_of(f), "config": b"[" * 9999}, 422, "adapter_config.json: expected"),
        (lambda f: {**files_of(f), "config": b"[]"}, 422, "expected a JSON object"),
        (lambda f: damaged(f, config={"peft_type": "LORA"}), 422, "LORAXS"),
        (lambda f: damaged(f, config={"use_edora": True}), 422, "edora"),
        (lambda f: damaged(f, config={"rank_pattern": {r"([\w.]+)+!": 4}}), 422, "in reasonable time, got"),
        (lambda f: damaged(f, config={"use_tinylora": True, "u": 1 << 40}), 422, "u · r²"),
        (lambda f: damaged(f, config={"sigma": "sqrt"}), 422, "sigma"),
        (lambda f: damaged(f, lambda t: {k: v * torch.nan for k, v in t.items()}), 422, "finite"),
        (lambda f: damaged(f, lambda t: {k: v[:2] for k, v in t.items()}), 422, "expected"),
        (lambda f: damaged(f, lambda t: {k.replace("q_", "x_"): v for k, v in t.items()}), 422, "does not know"),
        (
            lambda f: damaged(f, lambda t: {k: v.flip(-1).contiguous() if "sketch" in k else v for k, v in t.items()}),
            422,
            "of another base model or recipe",
        ),
    ],
    ids=[
        "no config", "more files", "zeros", "long header", "cut", "large", "config cut", "config deep",
        "config list", "LoRA", "EDoRA", "pattern without end",
        "huge TinyLoRA", "other sigma", "NaN", "not square", "other modules", "other basis",
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_this_store_is_refused(site: Site, server: Running, change, status, sentence):
    found, _, body = put(server, "bad", change(site.folders["spare"]))
    assert found == status, body
    message = body["error"]["message"]
    assert sentence in message and message and "/tmp" not in message
    assert "bad" not in server.service.store
    assert ask(server, "alice", 2) == site.text("alice", PROMPT, 2)


@pytest.mark.parametrize("name", ["a%00b", "a" * 600, "%09", ""], ids=["zero", "long", "tabulator", "none"])
def test_names_that_are_none(site: Site, server: Running, name):
    status, _, body = put(server, name, files_of(site.folders["spare"]))
    assert status == 422 and "name: expected" in body["error"]["message"]
    assert delete(server, name) == 404


def test_a_line_break_at_the_end_of_a_name_does_not_mean_the_name_without_it(site: Site, server: Running):
    before = server.service.store.version("alice")
    assert put(server, "alice%0A", files_of(site.folders["spare"]))[0] == 404
    assert delete(server, "alice%0A") == 404
    assert send(server, "GET", "/v1/models/tiny%3Aalice%0A")[0] == 404
    assert server.service.store.version("alice") == before
