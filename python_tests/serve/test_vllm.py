"""The plugin without vLLM: plain LoRAs that say exactly what R says, names, versions, and what stands in front."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from loraxs_ext import LoraXSConfig, to_lora
from loraxs_ext.basis import BasisFile, decompose, write_basis_file
from loraxs_ext.checkpoint.model_folder import WeightStream, find_targets
from loraxs_ext.serve.vllm.guard import GuardPlugin, RequestGuard
from loraxs_ext.serve.vllm.plugin import ADAPTERS, BASIS, CACHE, CACHE_GB, AdapterResolver, Held, Settings, register
from loraxs_ext.serve.vllm.sources import read_adapter
from loraxs_ext.store import AdapterStore, Manifest, in_dtype

from ..checkpoint.folders import Folders, save
from ..peft.models import CASES

GB = 1 << 30


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """A tiny Llama and one adapter of it."""
    return adapter(tmp_path)


def adapter(path: Path, **config: Any) -> Folders:
    case = CASES["llama"]
    made = save(case, path / "made", **config)
    (path / "adapters").mkdir()
    moved = path / "adapters" / "alice"
    made.adapter.rename(moved)
    return made._replace(adapter=moved)


def resolver(
    folders: Folders, adapters: Path | None = None, basis: Path | None = None, gb: float = 1
) -> AdapterResolver:
    where = adapters or folders.adapter.parent
    return AdapterResolver(Settings(where, basis, folders.base.parent / "cache", int(gb * GB)))


def store_of(folders: Folders, path: Path, dtype: torch.dtype = torch.float32) -> AdapterStore:
    found = read_adapter("alice", folders.adapter)
    store = AdapterStore.create(path, Manifest("", found.recipe.to_dict(), {"peft_type": "LORAXS"}, found.sketches))
    store.put(in_dtype(found.row, dtype))
    return store


def basis_file(folders: Folders, path: Path, flip: bool = False) -> Path:
    """The bases of the adapter's layers, of two ranks more; with `flip`, every other vector points the other way."""
    config = LoraXSConfig.from_pretrained(str(folders.adapter))
    targets, stream = find_targets(folders.base, config), WeightStream()
    weights = {target.key: stream.read(target) for target in targets}
    ranks = {target.key: min(target.rank + 2, *target.shape) for target in targets}
    factors = decompose(weights, ranks, config.recipe(), cache_dir="default")
    if flip:
        signs = {key: (-1.0) ** torch.arange(r)[:, None] for key, r in ranks.items()}
        factors = {key: f._replace(a=f.a * signs[key], bt=f.bt * signs[key]) for key, f in factors.items()}
    write_basis_file(path, config.recipe(), factors)
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# What is written.


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 40, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}, "use_rslora": True},
        {"sigma": "sqrt", "save_basis": True},
    ],
    ids=["plain", "patterns", "sqrt"],
)
def test_a_folder_becomes_the_very_lora_that_export_writes(config: dict[str, Any], tmp_path: Path) -> None:
    folders = adapter(tmp_path, **config)
    model = folders.adapted()
    to_lora(model, tmp_path / "exported")
    held = resolver(folders).hold(str(folders.base), "alice")
    assert held is not None
    wanted, found = tensors(tmp_path / "exported"), tensors(held.folder)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    # In stock PEFT, which knows nothing of LoRA-XS, it gives the same logits.
    loaded = folders.adapted(held.folder)
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(folders.logits(loaded), folders.logits(model), rtol=1e-5, atol=1e-5)
    assert (folders.logits(loaded) - folders.logits(folders.load())).abs().max() > 1e-2
    held.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_row_of_a_store_becomes_the_same_lora_up_to_its_rounding(
    dtype: torch.dtype, folders: Folders, tmp_path: Path
) -> None:
    pytest.importorskip("lmdb")
    with store_of(folders, tmp_path / "store", dtype) as store:
        row = in_dtype(store.row("alice"), torch.float32)
    held = resolver(folders, tmp_path / "store").hold(str(folders.base), "alice")
    assert held is not None
    found = tensors(held.folder)
    model = folders.adapted()
    layers = {m.key: m for m in model.modules() if hasattr(m, "loraxs_R")}
    for index, (key, r, scaling) in enumerate(row.layout.segments):
        start = row.layout.offsets[index]
        a, b = layers[key].get_basis("default")
        wanted = row.numbers[start : start + r * r].view(r, r) * scaling @ a
        assert torch.equal(found[f"base_model.model.{key}.lora_A.weight"], wanted.detach())
        assert torch.equal(found[f"base_model.model.{key}.lora_B.weight"], b)


def test_a_basis_file_serves_without_the_base_whatever_its_signs_and_larger_ranks(
    folders: Folders, tmp_path: Path
) -> None:
    model = folders.adapted()
    for flip in (False, True):
        file = basis_file(folders, tmp_path / f"bases{flip}.safetensors", flip)
        held = resolver(folders, basis=file).hold("some/name-on-a-hub", "alice")
        assert held is not None
        loaded = folders.adapted(held.folder)
        torch.testing.assert_close(folders.logits(loaded), folders.logits(model), rtol=1e-5, atol=1e-5)
        assert json.loads((held.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == (
            "some/name-on-a-hub"
        )


# What is refused.


def test_an_adapter_of_another_base_is_refused_and_nothing_is_written(folders: Folders, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = folders.case.base()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    other.save_pretrained(tmp_path / "other")
    ours = resolver(folders)
    with pytest.raises(ValueError, match="was trained on another base model"):
        ours.hold(str(tmp_path / "other"), "alice")
    assert list((folders.base.parent / "cache").glob("[!.]*")) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_edora": True}, "R matrices of linear layers alone, got .*magnitude"),
        ({"modules_to_save": ["lm_head"]}, "R matrices of linear layers alone, got .*lm_head"),
        ({"use_tinylora": True}, "R matrices of linear layers alone, got .*loraxs"),
    ],
    ids=["edora", "head", "tinylora"],
)
def test_adapters_of_more_than_r_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folders = adapter(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        resolver(folders).hold(str(folders.base), "alice")


def test_other_refusals_name_what_was_expected(folders: Folders, tmp_path: Path) -> None:
    ours = resolver(folders)
    with pytest.raises(ValueError, match="folder of the base model, or a file of its bases"):
        ours.hold("some/name-on-a-hub", "alice")
    ours.max_rank = 2
    with pytest.raises(ValueError, match="rank of at most 2, got 4; start vLLM with --max-lora-rank 4"):
        ours.hold(str(folders.base), "alice")
    get_peft_model(folders.load(), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapters" / "lora"
    )
    with pytest.raises(ValueError, match="expected a LoRA-XS adapter, got one of type 'LORA'"):
        ours.hold(str(folders.base), "lora")
    small = basis_file(folders, tmp_path / "bases.safetensors")
    with BasisFile(small) as file:
        left = {name: file.factors(name) for name in list(file.modules)[1:]}
        recipe = file.recipe
    write_basis_file(tmp_path / "fewer.safetensors", recipe, left)
    with pytest.raises(ValueError, match="of rank 4, got .*fewer.safetensors with rank 0"):
        resolver(folders, basis=tmp_path / "fewer.safetensors").hold("x", "alice")
    with pytest.raises(FileNotFoundError, match="expected an adapter store or a folder of adapters"):
        resolver(folders, tmp_path / "nowhere").hold(str(folders.base), "alice")


@pytest.mark.parametrize("name", ["nobody", "..", ".", "../adapters/alice", "alice/", "/", "", "adapter_config.json"])
def test_there_is_no_adapter_of_another_name_than_a_folder_has(name: str, folders: Folders) -> None:
    assert resolver(folders).hold(str(folders.base), name) is None


# Versions.


def test_content_decides_folder_and_number(folders: Folders) -> None:
    base = str(folders.base)
    ours = resolver(folders)
    first = read_adapter("alice", folders.adapter)
    shelf = {"alice": first}
    ours._adapters = SimpleNamespace(find=shelf.get)

    def hold(name: str, factor: float) -> Held:
        row = first.row._replace(name=name, numbers=first.row.numbers * factor)
        shelf[name] = first._replace(row=row)
        held, again = ours.hold(base, name), ours.hold(base, name)
        assert held is not None and again is not None and held[:2] == again[:2] and 0 < held.number < 2**63
        assert held.folder.parent == folders.base.parent / "cache"
        return held

    one, two, three = (hold("alice", factor) for factor in (1.0, 2.0, 1.0))
    assert one[:2] == three[:2] and one.folder != two.folder and one.number != two.number
    other = hold("../b", 1.0)
    assert other.folder == one.folder and other.number != one.number


def test_a_folder_that_was_saved_anew_is_seen(folders: Folders) -> None:
    ours = resolver(folders)
    first = ours.hold(str(folders.base), "alice")
    model = get_peft_model(folders.load(), folders.case.config(init_seed=5))
    model.save_pretrained(folders.adapter)
    second = ours.hold(str(folders.base), "alice")
    assert first is not None and second is not None and first.folder != second.folder


# Settings and registration.


def test_settings() -> None:
    assert Settings.read({}) is None and Settings.read({ADAPTERS: ""}) is None
    read = Settings.read({ADAPTERS: "/store", BASIS: "/b.safetensors", CACHE: "/cache", CACHE_GB: "0.5"})
    assert read == Settings(Path("/store"), Path("/b.safetensors"), Path("/cache"), GB // 2)
    plain = Settings.read({ADAPTERS: "/store"})
    assert plain is not None and plain.basis is None and plain.cache.name == "vllm" and plain.limit == 16 * GB
    for wrong in ("much", "-1", "inf", "nan"):
        with pytest.raises(ValueError, match=f"{CACHE_GB}: expected a number of gigabytes, got '{wrong}'"):
            Settings.read({ADAPTERS: "/store", CACHE_GB: wrong})


class Request(SimpleNamespace):
    """In the place of vLLM's LoRARequest."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the plugin needs of vLLM, which a test here must not depend on; test_vllm_server.py has the real one."""
    known: dict[str, Any] = {}
    found = SimpleNamespace(
        get_supported_resolvers=known.keys, get_resolver=known.__getitem__, register_resolver=known.__setitem__
    )
    resolvers = {"LoRAResolverRegistry": found, "LoRAResolver": SimpleNamespace(register=lambda kind: kind)}
    forgets = {"UnloadLoRAAdapterRequest": Request}
    parts: dict[str, Mapping[str, Any]] = {
        "vllm": {},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False)},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": Request},
        "vllm.lora.resolver": resolvers,
        "vllm.entrypoints": {},
        "vllm.entrypoints.serve": {},
        "vllm.entrypoints.serve.lora": {},
        "vllm.entrypoints.serve.lora.protocol": forgets,
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_registration_opens_nothing_and_happens_once(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADAPTERS, raising=False)
    register()
    assert list(registry.get_supported_resolvers()) == []
    monkeypatch.setenv(ADAPTERS, "/nowhere")
    register()
    first = registry.get_resolver("loraxs")
    register()
    assert registry.get_resolver("loraxs") is first


def test_the_resolver_answers_vllm(registry: Any, folders: Folders) -> None:
    ours = resolver(folders, gb=0)
    base = str(folders.base)
    assert asyncio.run(ours.resolve_lora(base, "nobody")) is None
    request = asyncio.run(ours.resolve_lora(base, "alice"))
    assert request is not None and request.lora_name == "alice" and request.lora_int_id > 0
    assert ours.owns(request.lora_path) and not ours.owns("/some/lora") and Path(request.lora_path).is_dir()
    # Nobody knows when vLLM reads the files again, so a cache without any room keeps them.
    model = get_peft_model(folders.load(), folders.case.config(init_seed=5))
    model.save_pretrained(folders.adapter)
    other = asyncio.run(ours.resolve_lora(base, "alice"))
    assert other is not None and other.lora_path != request.lora_path and other.lora_int_id != request.lora_int_id
    assert Path(request.lora_path).is_dir() and Path(other.lora_path).is_dir()


# In front of the routes.


class Models:
    """What vLLM's server remembers, as `OpenAIServingModels` does."""

    def __init__(self, base: Path) -> None:
        self.lora_requests: dict[str, Any] = {}
        self.model_config = SimpleNamespace(model=str(base))

    def is_base_model(self, name: str) -> bool:
        return name == "base"

    async def unload_lora_adapter(self, request: Any) -> None:
        self.lora_requests.pop(request.lora_name, None)


class Served:
    """A resolver behind a guard around an application that asks it as vLLM does."""

    def __init__(self, folders: Folders, gb: float = 0) -> None:
        self.resolver = resolver(folders, gb=gb)
        self.resolver.guarded = True
        self.models = Models(folders.base)
        self.bodies: list[bytes] = []
        self.during: Any = lambda request: None
        self.guard = RequestGuard(self._app, self.resolver, SimpleNamespace(openai_serving_models=self.models))

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        self.bodies.append(body)
        name = json.loads(body)["model"] if body.startswith(b"{") else "base"
        if name == "base":
            return
        if name not in self.models.lora_requests:
            found = await self.resolver.resolve_lora(self.models.model_config.model, name)
            if found is None:
                return
            self.models.lora_requests[name] = found
        self.during(self.models.lora_requests[name])

    def post(self, body: bytes, kind: bytes = b"application/json; charset=utf-8", method: str = "POST") -> None:
        half = len(body) // 2
        messages = [
            {"type": "http.request", "body": body[:half], "more_body": True},
            {"type": "http.request", "body": body[half:], "more_body": False},
        ]

        async def receive() -> Any:
            return messages.pop(0)

        scope = {"type": "http", "method": method, "headers": [(b"Content-Type", kind)]}
        asyncio.run(self.guard(scope, receive, None))  # type: ignore[arg-type]


def ask(name: str) -> bytes:
    return json.dumps({"model": name, "prompt": "x"}).encode()


def test_files_stay_for_the_time_of_a_request_and_no_longer(registry: Any, folders: Folders) -> None:
    model = get_peft_model(folders.load(), folders.case.config(init_seed=5))
    model.save_pretrained(folders.adapter.with_name("bob"))
    # A cache without any room.
    served = Served(folders, gb=0)
    paths = []

    def during(request: Any) -> None:
        paths.append(Path(request.lora_path))
        # Another adapter comes and goes meanwhile.
        other = served.resolver.hold(str(folders.base), "bob")
        assert other is not None and other.folder.is_dir()
        other.release()
        assert not other.folder.exists() and paths[-1].is_dir()

    served.during = during
    served.post(ask("alice"))
    assert not paths[0].exists()
    # It comes again when it is asked for again, though vLLM would not have asked.
    served.post(ask("alice"))
    assert paths[0] == paths[1] and not paths[0].exists()


def test_what_was_replaced_or_deleted_is_asked_for_again(registry: Any, folders: Folders) -> None:
    served = Served(folders, gb=1)
    seen = []
    served.during = lambda request: seen.append(request.lora_path)
    served.post(ask("alice"))
    served.post(ask("alice"))
    assert seen[0] == seen[1]
    get_peft_model(folders.load(), folders.case.config(init_seed=5)).save_pretrained(folders.adapter)
    served.post(ask("alice"))
    assert seen[2] != seen[0]
    folders.adapter.rename(folders.adapter.with_name("gone"))
    served.post(ask("alice"))
    assert len(seen) == 3 and "alice" not in served.models.lora_requests
    # What others told vLLM of is none of ours.
    served.models.lora_requests["static"] = Request(lora_path="/some/lora")
    served.post(ask("static"))
    assert seen[3] == "/some/lora"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"not json", b'{"model": 3}', b"[" * 100_000, ask("base"), b"\xff\xfe"],
    ids=lambda b: str(b[:9]),
)
def test_every_body_arrives_as_it_was_sent(body: bytes, registry: Any, folders: Folders) -> None:
    served = Served(folders)
    for kind, method in ((b"application/json", "POST"), (b"text/plain", "POST"), (b"application/json", "PUT")):
        if body.startswith(b"{") and json.loads(body)["model"] == 3:
            served.during = lambda request: None
            served.models.lora_requests[3] = None  # type: ignore[index]
        served.post(body, kind, method)
    assert served.bodies == [body] * 3


def test_what_cannot_be_served_is_said_by_the_resolver_and_forgotten(registry: Any, folders: Folders) -> None:
    served = Served(folders, gb=1)
    served.post(ask("alice"))
    served.resolver.max_rank = 1
    with pytest.raises(ValueError, match="rank of at most 1"):
        served.post(ask("alice"))
    assert "alice" not in served.models.lora_requests


def test_the_guard_is_put_around_the_routes_of_a_registered_resolver(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[Any] = []
    app = SimpleNamespace(add_middleware=lambda kind, **options: added.append((kind, options)), state=SimpleNamespace())
    GuardPlugin().attach_router(app)
    assert added == []
    monkeypatch.setenv(ADAPTERS, "/nowhere")
    register()
    plugin = GuardPlugin()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(None, app.state, SimpleNamespace(max_lora_rank=32)))  # type: ignore[arg-type]
    ours = registry.get_resolver("loraxs")
    assert added == [(RequestGuard, {"resolver": ours, "state": app.state})]
    assert ours.guarded and ours.max_rank == 32


def test_importing_the_plugin_brings_no_engine() -> None:
    code = (
        "import sys; import loraxs_ext.serve.vllm.plugin, loraxs_ext.serve.vllm.guard;"
        "print([m for m in ('vllm', 'lmdb', 'fastapi', 'starlette', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_peft_reads_the_configuration_as_alpha_equal_r(folders: Folders) -> None:
    held = resolver(folders).hold(str(folders.base), "alice")
    assert held is not None
    fields = json.loads((held.folder / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["r"] == fields["lora_alpha"] == 4
    assert fields["bias"] == "none" and not fields["use_dora"] and not fields["use_rslora"]
    assert isinstance(PeftModel.from_pretrained(folders.load(), held.folder), PeftModel)
