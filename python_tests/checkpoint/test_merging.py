"""Merging from folder to folder: the model that PEFT's merge_and_unload gives, without ever holding it."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from loraxs_ext import LoraXSConfig, merge
from loraxs_ext.checkpoint import model_folder
from loraxs_ext.layers import MergeLossWarning
from loraxs_ext.peft import bases

from ..peft.models import CASES, Case, logits
from .folders import Folders, save

ROOT = Path(__file__).parents[2]


def expected(folders: Folders) -> Tensor:
    """The logits of merge_and_unload."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeLossWarning)
        return folders.logits(folders.adapted().merge_and_unload())


def check(folders: Folders, output: Path, **options: Any) -> None:
    """Merged as PEFT merges, in the layout of the base, and different from it."""
    merge(folders.base, folders.adapter, output, progress=False, **options)
    merged = folders.logits(folders.load(output))
    assert torch.equal(merged, expected(folders))
    assert (merged - folders.logits(folders.load())).abs().max() > 1e-2
    shards = {f.name: safe_open(f, framework="pt").keys() for f in folders.base.glob("*.safetensors")}
    assert {f.name: safe_open(f, framework="pt").keys() for f in output.glob("*.safetensors")} == shards


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_merge_and_unload(name: str, tmp_path: Path) -> None:
    """Many shards, so that no two weights of a block lie together; transposed weights, ties, a head."""
    folders = save(CASES[name], tmp_path)
    assert len(list(folders.base.glob("*.safetensors"))) > 4
    check(folders, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shard", ["10KB", "1GB"])
def test_half_precision_is_rounded_once(dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path, dtype=dtype, shard=shard)
    check(folders, tmp_path / "out")
    assert folders.load(tmp_path / "out").dtype == dtype


@pytest.mark.parametrize(
    "config",
    [
        {"r": 40, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}, "use_rslora": True},
        {"sigma": "sqrt", "save_basis": True},
        {"vectors": "random"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_configurations(config: dict[str, Any], tmp_path: Path) -> None:
    check(save(CASES["gpt2" if "bias" in config else "llama"], tmp_path, **config), tmp_path / "out")


def test_another_precision_of_the_result(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path)
    whole = folders.adapted().merge_and_unload()
    done = merge(folders.base, folders.adapter, tmp_path / "out", dtype=torch.bfloat16, progress=False)
    merged = folders.load(tmp_path / "out")
    assert merged.dtype == torch.bfloat16 and 0 < max(done.losses.values()) < 0.1
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name].to(torch.bfloat16)), name
    assert done.nbytes == sum(t.nbytes for f in (tmp_path / "out").glob("*.safetensors") for t in load_file(f).values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes


def test_what_rounding_takes_away_is_said(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path, lora_alpha=1e-3)
    with pytest.warns(MergeLossWarning, match="rounding the merged weight changes") as caught:
        done = merge(folders.base, folders.adapter, tmp_path / "out", dtype=torch.bfloat16, progress=False)
    assert len(caught) == 1 and caught[0].message.loss == max(done.losses.values()) > 0.1
    assert max(merge(folders.base, folders.adapter, tmp_path / "exact", progress=False).losses.values()) < 1e-2


def test_overflow_is_refused(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path, lora_alpha=1e7)
    with pytest.raises(ValueError, match="q_proj: expected a merged weight that torch.float16 can hold"):
        merge(folders.base, folders.adapter, tmp_path / "out", dtype=torch.float16, progress=False)
    assert not (tmp_path / "out").exists()


# Heads and ties


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    """A classifier trained on a checkpoint of the body alone, as encoders are published."""
    case = CASES["bert"]
    body: BertModel = case.base().bert
    body.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = get_peft_model(model, case.config()).eval()
    wanted = logits(model, case.inputs())
    model.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert done.added == ["classifier.bias", "classifier.weight"]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert merged.config.architectures == ["BertForSequenceClassification"] and merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged, case.inputs()), wanted, rtol=1e-5, atol=1e-5)


def test_a_body_stays_one(tmp_path: Path) -> None:
    """An adapter of AutoModel, which names its class, over a checkpoint with a head."""
    CASES["bert"].base().save_pretrained(tmp_path / "base")
    model = BertModel.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraXSConfig(r=4, target_modules=["query"], init_weights=False)).eval()
    inputs = CASES["bert"].inputs()
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state
        model.save_pretrained(tmp_path / "adapter")
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
        merged = BertModel.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(merged(**inputs).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)
    assert "classifier.weight" in load_file(tmp_path / "out" / "model.safetensors")


def _tied() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes))


@pytest.mark.parametrize("shard", ["6KB", "1GB"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["none", "lm_head", "saved lm_head", "saved embedding"],
)
def test_tied_weights_part_when_one_of_them_changes(config: dict[str, Any], shard: str, tmp_path: Path) -> None:
    folders = save(Case(_tied, ("q_proj",), "CAUSAL_LM"), tmp_path, shard=shard, **config)
    merge(folders.base, folders.adapter, tmp_path / "out", progress=False)
    merged = folders.load(tmp_path / "out")
    assert merged.config.tie_word_embeddings is (len(config) == 1 and len(config["target_modules"]) == 1)
    assert torch.equal(folders.logits(merged), folders.logits(folders.adapted().merge_and_unload()))


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    t5 = save(CASES["t5"], tmp_path / "t5", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="ties to another weight; an encoder-decoder"):
        merge(t5.base, t5.adapter, tmp_path / "out", progress=False)
    rows = save(CASES["llama"], tmp_path / "rows", trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match="trainable_token_indices: expected none"):
        merge(rows.base, rows.adapter, tmp_path / "out", progress=False)


# Verification


def test_wrong_base_is_refused_with_numbers(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path)
    CASES["llama"].base(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on another base model.*error .*accepted up to 0.1"):
        merge(tmp_path / "other", folders.adapter, tmp_path / "out", progress=False)
    CASES["gpt2"].base().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="q_proj"):
        merge(tmp_path / "gpt2", folders.adapter, tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "gpt2", "other"]


def test_rounded_base_is_transported_with_the_anchors_of_all_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R of an fp32 base on a bf16 one: what loading does, and one warning for all modules."""
    folders = save(CASES["llama"], tmp_path)
    CASES["llama"].base(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    found: list[str] = []
    restore = bases.restore
    monkeypatch.setattr(
        bases, "restore", lambda file, sketches, *rest: found.extend(sketches) or restore(file, sketches, *rest)
    )
    half = folders._replace(base=tmp_path / "half")
    with pytest.warns(UserWarning, match="base weights differ slightly") as caught:
        merge(half.base, half.adapter, tmp_path / "out", progress=False)
    assert sum("differ slightly" in str(w.message) for w in caught) == 1
    assert len(set(found)) == len(found) == 6
    with pytest.warns(UserWarning, match="base weights differ slightly"):
        wanted = expected(half)
    assert torch.equal(half.logits(half.load(tmp_path / "out")), wanted)


# Memory


def test_one_weight_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of stored tensors that are alive at once, counted where they are read."""
    folders = save(CASES["llama"], tmp_path, dtype=torch.bfloat16, shard="1GB")
    largest = max(t.nbytes for t in load_file(folders.base / "model.safetensors").values())
    total = (folders.base / "model.safetensors").stat().st_size
    held = peak = 0

    def give_back(nbytes: int) -> None:
        nonlocal held
        held -= nbytes

    class Watched:
        def __init__(self, path: Path, **options: Any) -> None:
            self.file = safe_open(path, **options)

        def __enter__(self) -> Watched:
            self.file.__enter__()
            return self

        def __exit__(self, *reason: Any) -> None:
            self.file.__exit__(*reason)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            nonlocal held, peak
            tensor = self.file.get_tensor(name).clone()
            held += tensor.nbytes
            peak = max(peak, held)
            weakref.finalize(tensor.untyped_storage(), give_back, tensor.nbytes)
            return tensor

    monkeypatch.setattr(model_folder, "safe_open", Watched)
    monkeypatch.setattr("loraxs_ext.checkpoint.merging.safe_open", Watched)
    gc.disable()
    try:
        merge(folders.base, folders.adapter, tmp_path / "out", progress=False)
    finally:
        gc.enable()
    assert largest <= peak <= 2 * largest < total / 4
