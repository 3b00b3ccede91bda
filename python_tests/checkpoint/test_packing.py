"""Adapter folders into a store and out again: the same bits, the same logits, and refusals with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraxs_ext.checkpoint.packing import find_adapters, manifest_of, pack, row_of, unpack
from loraxs_ext.store import AdapterStore, dequantise, quantise

from ..peft.models import CASES
from .folders import Folders

pytest.importorskip("lmdb")

CASE = CASES["llama"]


def another(made: Folders, path: Path, **config: Any) -> Path:
    """One more adapter of the same base, with numbers of its own."""
    model = get_peft_model(made.load(), CASE.config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    return path


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def rewrite(folder: Path, target: Path, changes: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    """A copy of an adapter with other tensors or other fields in its configuration."""
    shutil.copytree(folder, target)
    save_file({**tensors(folder), **(changes or {})}, target / "adapter_model.safetensors")
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return target


def stored(path: Path, *folders: Path, **options: Any) -> AdapterStore:
    """A store like the first of these adapters, with all of them under the names of their folders."""
    store = AdapterStore.create(path, manifest_of(folders[0]))
    outcomes = list(pack(store, {folder.name: folder for folder in folders}, **options))
    assert [(one.outcome, one.reason) for one in outcomes] == [("added", None)] * len(folders)
    return store


KINDS = {
    "plain": {},
    "other ranks": {"r": 3, "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "lora_alpha": 7},
    "other scalings": {"alpha_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 0.3}, "lora_alpha": 11},
    "rslora": {"r": 3, "use_rslora": True, "lora_alpha": 5},
    "some modules": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "one kind of module": {"target_modules": ["down_proj"], "r": 3},
    "tinylora": {"use_tinylora": True, "u": 5},
    "tied tinylora": {"use_tinylora": True, "u": 3, "weight_tying": 0.6, "rank_pattern": {"v_proj": 2}},
    "tinylora with projections": {"use_tinylora": True, "u": 3, "weight_tying": 1.0, "save_projection": True},
    "with its basis": {"save_basis": True},
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_an_adapter_comes_out_as_it_went_in(made: Folders, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = another(made, tmp_path / "alice", **config)
    # rsLoRA is a matter of the store's configuration, the others live beside a plain one.
    first = folder if "use_rslora" in config else made.adapter
    with AdapterStore.create(tmp_path / "store", manifest_of(first)) as store:
        assert [one.reason for one in pack(store, {"alice": folder})] == [None]
        unpack(store, "alice", tmp_path / "out")
        # And once more, from what came out.
        assert [one.outcome for one in pack(store, {"alice": tmp_path / "out"})] == ["unchanged"]
    ours, theirs = made.adapted(tmp_path / "out"), made.adapted(folder)
    for (name, layer), (_, other) in zip(_layers(ours), _layers(theirs), strict=True):
        assert torch.equal(layer.get_R("default"), other.get_R("default")), name
        assert layer.scaling == other.scaling, name
    assert torch.equal(made.logits(ours), made.logits(theirs))
    assert not torch.equal(made.logits(ours), made.logits(made.load()))


def _layers(model: Any) -> list[tuple[str, Any]]:
    from loraxs_ext.layers import LoraXSLayer

    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraXSLayer) and "default" in m.loraxs_R]


def test_an_fp32_adapter_keeps_every_tensor_and_its_fingerprint(made: Folders, tmp_path: Path) -> None:
    with stored(tmp_path / "store", made.adapter) as store:
        unpack(store, "adapter", tmp_path / "out")
        with pytest.raises(FileExistsError):
            unpack(store, "adapter", tmp_path / "out")
        unpack(store, "adapter", tmp_path / "out", overwrite=True)
        with pytest.raises(KeyError, match="no adapter 'nobody'"):
            unpack(store, "nobody", tmp_path / "nobody")
    assert not (tmp_path / "nobody").exists()
    before, after = tensors(made.adapter), tensors(tmp_path / "out")
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (made.adapter, tmp_path / "out"))
    changed = {name: (old[name], new.get(name)) for name in old if old[name] != new.get(name)}
    assert set(changed) <= {"target_modules", "init_weights"}
    assert sorted(old["target_modules"]) == sorted(new["target_modules"])


def test_the_row_is_what_the_folder_says(made: Folders) -> None:
    row = row_of("alice", made.adapter, manifest_of(made.adapter))
    parts = tensors(made.adapter)
    assert [segment.key for segment in row.layout.segments] == sorted(row.layout.index)
    for (key, r, scaling), offset in zip(row.layout.segments, row.layout.offsets, strict=True):
        R = parts[f"base_model.model.{key}.loraxs_R.weight"]
        assert torch.equal(row.numbers[offset : offset + r * r].view(r, r), R) and scaling == 8 / 4
    assert (row.name, row.numbers.dtype, row.steps) == ("alice", torch.float32, None)


def test_singular_vectors_that_point_the_other_way_turn_r(made: Folders, tmp_path: Path) -> None:
    changes = {}
    for index, (name, tensor) in enumerate(sorted(tensors(made.adapter).items())):
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).roll(index // 2)
        if name.endswith("sketch"):
            changes[name] = torch.cat([tensor[:4] * signs, tensor[4:]])
        else:
            changes[name] = signs[:, None] * tensor * signs
    turned = rewrite(made.adapter, tmp_path / "turned", changes)
    manifest = manifest_of(made.adapter)
    assert torch.equal(row_of("a", turned, manifest).numbers, row_of("a", made.adapter, manifest).numbers)
    assert not torch.equal(row_of("a", turned, manifest_of(turned)).numbers, row_of("a", turned, manifest).numbers)


def test_a_basis_as_accurate_as_the_recipe_asks_is_the_same(made: Folders, tmp_path: Path) -> None:
    def shifted(by: float) -> dict[str, Tensor]:
        return {name: t * (1 + by) for name, t in tensors(made.adapter).items() if name.endswith("sketch")}

    manifest = manifest_of(made.adapter)
    near = rewrite(made.adapter, tmp_path / "near", shifted(5e-4))
    assert torch.equal(row_of("a", near, manifest).numbers, row_of("a", made.adapter, manifest).numbers)
    far = rewrite(made.adapter, tmp_path / "far", shifted(2e-3))
    with pytest.raises(
        ValueError, match=r"another base model or recipe: model\S+ differs by 0.002, accepted up to 0.0"
    ):
        row_of("a", far, manifest)


def test_another_base_recipe_rank_or_module_is_refused_with_numbers(made: Folders, tmp_path: Path) -> None:
    manifest = manifest_of(another(made, tmp_path / "small", r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="which has 2, got 4 of 6 that it does not know, one of them 'model"):
        row_of("a", made.adapter, manifest)
    with pytest.raises(ValueError, match=r"q_proj: expected a rank of at most 2, the store's, got 4"):
        row_of("a", another(made, tmp_path / "large", target_modules=["q_proj"]), manifest)
    CASE.base(seed=1).save_pretrained(tmp_path / "base")
    foreign = another(made._replace(base=tmp_path / "base"), tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"differs by [01]\.\d+, accepted up to 0.001"):
        row_of("a", foreign, manifest_of(made.adapter))
    # A and B of the same vectors, but R means something else.
    with pytest.raises(ValueError, match="expected singular values placed by sigma='A', got 'B'"):
        row_of("a", rewrite(made.adapter, tmp_path / "sigma", sigma="B"), manifest_of(made.adapter))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_edora": True}, "magnitudes"),
        ({"bias": "loraxs_only"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules \(modules_to_save=\['lm_head'\]\)"),
        ({"trainable_token_indices": [1, 2]}, "single tokens"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_more_than_r_is_refused(made: Folders, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = another(made, tmp_path / "more", **config)
    with pytest.raises(ValueError, match=f"{folder}: expected an adapter of nothing but R, got .*{message}"):
        row_of("a", folder, manifest_of(made.adapter))
    with pytest.raises(ValueError, match=message):
        manifest_of(folder)


def test_experts_and_other_kinds_of_adapters_are_refused(made: Folders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stacks of experts"):
        manifest_of(rewrite(made.adapter, tmp_path / "experts", target_parameters=["experts.gate_up_proj"]))
    get_peft_model(made.load(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="peft_type: expected 'LORAXS', got 'LORA'"):
        manifest_of(tmp_path / "lora")


NAME = "base_model.model.model.layers.0.self_attn.q_proj.loraxs_R."


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({NAME + "weight": torch.full((4, 4), torch.nan)}, {}, "q_proj: expected finite numbers in R"),
        ({NAME + "weight": torch.zeros(4, 3)}, {}, r"expected R \[r, r\] with r from 1 to 4, got \[4, 3\]"),
        ({NAME + "weight": torch.zeros(0, 0)}, {}, r"got \[0, 0\]"),
        ({NAME + "weight": torch.zeros(4, 4, dtype=torch.int32)}, {}, "weight: expected numbers of a known dtype"),
        ({NAME + "weight": torch.zeros(9, 9)}, {}, r"expected R \[r, r\] with r from 1 to 4, got \[9, 9\]"),
        ({NAME + "sketch": torch.zeros(5, 3)}, {}, r"expected a sketch \[5, 4\] of the basis, got \[5, 3\]"),
        ({NAME + "sketch": torch.full((5, 4), torch.nan)}, {}, "q_proj: expected finite numbers in the sketch"),
        (
            {"base_model.model.lm_head.weight": torch.zeros(1)},
            {},
            "expected tensors of R only, .* got .*lm_head.weight",
        ),
        ({NAME + "v": torch.zeros(5)}, {"use_tinylora": True, "u": 5}, "expected a sketch and a seed"),
        ({}, {"r": -1}, "r: expected a positive integer, got -1"),
        ({}, {"r": "4"}, "r: expected an int, got '4'"),
        ({}, {"lora_alpha": 10**400}, "lora_alpha: expected a finite number, got 1000"),
        ({}, {"rank_pattern": [1]}, r"rank_pattern: expected an object of numbers by name, got \[1\]"),
        ({}, {"alpha_pattern": {"(": 2}}, r"alpha_pattern: expected a regular expression, got '\('"),
        ({}, {"alpha_pattern": {"q_proj": None}}, "alpha_pattern: q_proj: expected a finite number, got None"),
        ({}, {"peft_type": None}, "peft_type: expected 'LORAXS', got None"),
    ],
)
def test_files_that_are_not_what_they_should_be(
    made: Folders, tmp_path: Path, changes: dict[str, Tensor], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        manifest_of(rewrite(made.adapter, tmp_path / "bad", changes, **fields))


def test_a_few_bytes_cannot_ask_for_all_memory(made: Folders, tmp_path: Path) -> None:
    """The P of a TinyLoRA are drawn, not stored: 80 kB of a file may ask for gigabytes."""
    tiny = rewrite(another(made, tmp_path / "tiny", use_tinylora=True, u=2), tmp_path / "huge", r=40_000)
    file = tiny / "adapter_model.safetensors"
    parts = load_file(file)
    name = next(name for name in parts if name.endswith("sketch"))
    save_file({**parts, name: torch.zeros(5, 40_000)}, file)
    with pytest.raises(ValueError, match=r"expected P of at most \d+ numbers, got \[2, 40000, 40000\]"):
        manifest_of(tiny)


def test_damaged_files(made: Folders, tmp_path: Path) -> None:
    folder = rewrite(made.adapter, tmp_path / "bad")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first, second = list(header)[1:3]
    lies = [
        {**header, first: {**header[first], "shape": [1 << 40]}},
        {**header, first: {**header[first], "shape": [-1, 16]}},
        {**header, first: {**header[first], "shape": [1 << 47] * 100_000}},
        {**header, first: {**header[first], "data_offsets": header[second]["data_offsets"]}},
        {name: entry for name, entry in header.items() if name != first},
        {**header, first: 3},
        [],
    ]
    texts = [json.dumps(lie).encode() for lie in lies] + [b"[" * 100000, b"\xff{}"]
    forged = [len(text).to_bytes(8, "little") + text + whole[8 + length :] for text in texts]
    cut = [b"", whole[:7], whole[:200], whole[:-1], whole + b"\0", (1 << 62).to_bytes(8, "little") + whole[8:]]
    for data in cut + forged:
        weights.write_bytes(data)
        with pytest.raises(ValueError, match=f"{folder}: .*expected (a whole safetensors|dtype, shape|.* in the file)"):
            manifest_of(folder)
    weights.write_bytes(whole)
    for text in ("", "[]", "{", "[" * 100000):
        config.write_text(text)
        with pytest.raises(ValueError, match="expected a JSON object"):
            manifest_of(folder)


def test_find_adapters(made: Folders, tmp_path: Path) -> None:
    for name in ("users/alice", "users/team/bob", "users/team/bob/checkpoint-1", "users/.alice.partial", "other"):
        shutil.copytree(made.adapter, tmp_path / name, dirs_exist_ok=True)
    (tmp_path / "users" / "empty").mkdir()
    users = find_adapters([tmp_path / "users"], "v1/")
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in users.items()} == {
        "v1/alice": "users/alice",
        "v1/team/bob": "users/team/bob",
        "v1/team/bob/checkpoint-1": "users/team/bob/checkpoint-1",
    }
    assert list(find_adapters([tmp_path / "users", tmp_path / "other"]))[-1] == "other"
    with pytest.raises(ValueError, match="got 'alice' for .* and "):
        find_adapters([tmp_path / "users", tmp_path / "users" / "alice"])
    with pytest.raises(NotADirectoryError):
        find_adapters([tmp_path / "nowhere"])


def test_packing_again_does_only_what_is_new(made: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraxs_ext.checkpoint.packing._BATCH", 2)
    for name in ("a", "b", "c", "d"):
        another(made, tmp_path / "users" / name)
    bad = rewrite(made.adapter, tmp_path / "users" / "bad", bias="all")
    with AdapterStore.create(tmp_path / "store", manifest_of(made.adapter)) as store:

        def outcomes(**options: Any) -> dict[str, str]:
            return {one.name: one.outcome for one in pack(store, find_adapters([tmp_path / "users"]), **options)}

        wanted = {"a": "added", "b": "added", "bad": "refused", "c": "added", "d": "added"}
        assert outcomes(dry_run=True) == wanted and len(store) == 0
        with pytest.raises(ValueError, match="'bad' was refused: .*biases"):
            outcomes(strict=True)
        # What was committed before the bad one stays.
        assert list(store) == ["a", "b"]
        assert outcomes() == {**wanted, "a": "unchanged", "b": "unchanged"}
        shutil.rmtree(tmp_path / "users" / "c")
        another(made, tmp_path / "users" / "c")
        assert outcomes() == {**dict.fromkeys(wanted, "unchanged"), "bad": "refused", "c": "replaced"}
        assert [store.version(name) for name in "abcd"] == [1, 1, 2, 1]
        # A change of the scaling alone is a change.
        rewrite(tmp_path / "users" / "a", tmp_path / "louder", lora_alpha=16)
        assert [one.outcome for one in pack(store, {"a": tmp_path / "louder"})] == ["replaced"]
        assert outcomes(dtype=torch.float16)["b"] == "replaced"
        assert store.check() == []
    assert bad.exists()


def test_a_name_that_no_adapter_can_have_is_refused_and_the_rest_is_packed(made: Folders, tmp_path: Path) -> None:
    names = {"a": "added", "caf\udce9": "refused", "new\nline": "refused", "x" * 501: "refused", "b": "added"}
    with AdapterStore.create(tmp_path / "store", manifest_of(made.adapter)) as store:
        packed = list(pack(store, dict.fromkeys(names, made.adapter)))
        assert {one.name: one.outcome for one in packed} == names
        assert all("name: expected" in str(one.reason) for one in packed if one.outcome == "refused")
        assert list(store) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, None], ids=str)
def test_other_dtypes(made: Folders, tmp_path: Path, dtype: torch.dtype | None) -> None:
    halves = {name: t.bfloat16() for name, t in tensors(made.adapter).items() if name.endswith("weight")}
    folder = rewrite(made.adapter, tmp_path / "half", halves) if dtype is None else made.adapter
    exact = row_of("x", folder, manifest_of(folder))
    with stored(tmp_path / "store", folder, dtype=dtype) as store:
        row = store.row(folder.name)
        assert row.numbers.dtype == (dtype or torch.bfloat16)
        unpack(store, folder.name, tmp_path / "out")
        assert [one.outcome for one in pack(store, {folder.name: folder}, dtype=dtype)] == ["unchanged"]
    out = row_of("x", tmp_path / "out", manifest_of(folder))
    if dtype == torch.int8:
        assert torch.equal(out.numbers, dequantise(*quantise(exact.numbers, exact.layout), exact.layout))
    else:
        assert torch.equal(out.numbers, exact.numbers.to(row.numbers.dtype))
