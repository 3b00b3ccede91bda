"""A plain LoRA with the same logits, for software that knows nothing of LoRA-XS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from safetensors.torch import load_file

from loraxs_ext import to_lora
from loraxs_ext.checkpoint import export_lora

from ..peft.models import CASES, Case, layers_of, train
from .folders import save


def check(path: Path, name: str = "llama", **config: Any) -> Path:
    """Both ways to export give the adapter's logits in stock PEFT."""
    folders = save(CASES[name], path, **config)
    model = folders.adapted()
    wanted = folders.logits(model)
    to_lora(model, path / "lora")
    export_lora(folders.base, folders.adapter, path / "streamed", progress=False)
    for lora in (path / "lora", path / "streamed"):
        loaded = folders.adapted(lora)
        assert isinstance(loaded.base_model, LoraModel) and not layers_of(loaded)
        torch.testing.assert_close(folders.logits(loaded), wanted, rtol=1e-5, atol=1e-5)
    one, two = (load_file(path / lora / "adapter_model.safetensors") for lora in ("lora", "streamed"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (wanted - folders.logits(folders.load())).abs().max() > 1e-2
    return path / "lora"


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    check(tmp_path, name)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 40, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}, "use_rslora": True},
        {"sigma": "sqrt", "save_basis": True},
        {"target_modules": r".*\.1\..*(q|v)_proj"},
        {"layers_to_transform": [1], "exclude_modules": ["down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"bias": "all"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_configurations(config: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, "gpt2" if "bias" in config else "llama", **config)


def test_factors_are_ra_and_b(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path, r=40, lora_alpha=3)
    model = folders.adapted()
    to_lora(model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for layer in layers_of(model):
        a, b = layer.get_basis("default")
        name = f"base_model.model.{layer.key}.lora"
        torch.testing.assert_close(tensors[f"{name}_A.weight"], 3 / 40 * layer.get_R("default").detach() @ a)
        assert torch.equal(tensors[f"{name}_B.weight"], b)
    assert len(tensors) == 2 * len(layers_of(model))
    fields = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    # What vLLM reads: one rank and alpha for all, though its modules may be smaller; names; nothing it does not know.
    assert fields["peft_type"] == "LORA" and fields["r"] == fields["lora_alpha"] == 32
    assert sorted(fields["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    assert fields["bias"] == "none" and not fields["use_dora"] and not fields["use_rslora"]
    assert (
        fields["rank_pattern"]
        == fields["alpha_pattern"]
        == {rf"^model\.layers\.{i}\.self_attn\.v_proj": 16 for i in (0, 1)}
    )


def test_the_one_adapter_that_is_named(tmp_path: Path) -> None:
    folders = save(CASES["bert"], tmp_path)
    model = folders.adapted()
    model.load_adapter(str(folders.adapter), adapter_name="other")
    with torch.no_grad():
        for layer in layers_of(model):
            layer.get_R("other").mul_(-1)
    model.set_adapter("other")
    wanted = folders.logits(model)
    to_lora(model, tmp_path / "lora", "other")
    torch.testing.assert_close(folders.logits(folders.adapted(tmp_path / "lora")), wanted, rtol=1e-5, atol=1e-5)
    for name in ("nobody", ""):
        with pytest.raises(ValueError, match="adapter_name: expected the name of a LoRA-XS adapter"):
            to_lora(model, tmp_path / "none", name)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path)
    model = folders.adapted()
    to_lora(model, tmp_path / "lora", dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {dtype}
    wanted = folders.logits(model)
    torch.testing.assert_close(folders.logits(folders.adapted(tmp_path / "lora")), wanted, rtol=0.05, atol=0.05)


def test_what_half_precision_cannot_hold(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path)
    model = folders.adapted()
    for layer in layers_of(model):
        layer.set_scale("default", 1e-8)
    with pytest.warns(UserWarning, match="rounding to torch.float16 changes the adapter's update by"):
        to_lora(model, tmp_path / "small", dtype=torch.float16)
    for layer in layers_of(model):
        layer.set_scale("default", 1e8)
    with pytest.raises(ValueError, match="expected an update that torch.float16 can hold"):
        to_lora(model, tmp_path / "large", dtype=torch.float16)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize("case", [CASES["llama"], CASES["gpt2"]], ids=["llama", "gpt2"])
def test_a_magnitude_makes_it_a_dora(case: Case, tmp_path: Path) -> None:
    """EDoRA is PEFT's DoRA with lora_A = R A, lora_B = B and its own magnitude."""
    folders = save(case, tmp_path, use_edora=True)
    model = folders.adapted()
    with torch.no_grad():
        for layer in layers_of(model):
            m = layer.loraxs_magnitude["default"].weight
            m.mul_(torch.rand(layer.out_features) + 0.5)
    to_lora(model, tmp_path / "dora")
    loaded = folders.adapted(tmp_path / "dora")
    assert loaded.peft_config["default"].use_dora
    torch.testing.assert_close(folders.logits(loaded), folders.logits(model), rtol=1e-4, atol=1e-4)


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path)
    with pytest.raises(FileExistsError, match="base exists"):
        to_lora(folders.adapted(), folders.base)
    with pytest.raises(FileExistsError, match="base exists"):
        export_lora(folders.base, folders.adapter, folders.base, progress=False)


def test_the_exported_lora_trains_on(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path)
    to_lora(folders.adapted(), tmp_path / "lora")
    model = PeftModel.from_pretrained(folders.load(), tmp_path / "lora", is_trainable=True)
    before = folders.logits(model)
    train(model, folders.case)
    assert (folders.logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_pefts_own_conversion_works_too(name: str, tmp_path: Path) -> None:
    """By a complete SVD of ΔW instead of the factors at hand."""
    folders = save(CASES[name], tmp_path)
    model = folders.adapted()
    config, tensors = convert_to_lora(model, 4)
    assert isinstance(config, LoraConfig) and tensors
    wanted = folders.logits(model)
    if name != "bert":  # of heads, it stores weights under names that PEFT does not load
        save_as_lora(tmp_path / "lora", model, 4)
        torch.testing.assert_close(folders.logits(folders.adapted(tmp_path / "lora")), wanted, rtol=1e-4, atol=1e-4)


def test_only_linear_layers_and_no_others(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path)
    lora = get_peft_model(folders.load(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="expected the name of a LoRA-XS adapter, got 'default'"):
        to_lora(lora, tmp_path / "lora")
