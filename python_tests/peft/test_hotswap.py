"""PEFT's hotswap: another adapter's tensors, scaling and alpha in the place of one, or a refusal."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

from .models import Case, layers_of, logits


def swap(model: PeftModel, folder) -> None:
    hotswap_adapter(model, str(folder), "default", torch_device="cpu")


def reloaded(case: Case, model: PeftModel, folder) -> torch.Tensor:
    """Logits of what `model` saves, on a base of its own."""
    model.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(case.base(), folder), case.inputs())


OPTIONS = [
    {},
    {"r": 3, "use_rslora": True},
    {"rank_pattern": {"v_proj": 2}},
    {"alpha_pattern": {r"layers\.1\..*proj": 30}},
    {"rank_pattern": {".*proj": 2}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
]


@pytest.mark.parametrize("lora_alpha", [8, 13])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("copier", [lambda model: model, copy.deepcopy], ids=["itself", "copy"])
def test_scaling_is_that_of_the_new_adapter(llama: Case, options, lora_alpha, copier, tmp_path):
    other = llama.model(init_seed=3, lora_alpha=lora_alpha, **options)
    other.save_pretrained(tmp_path / "other")
    model = copier(llama.model(**options))
    swap(model, tmp_path / "other")
    assert torch.equal(logits(model, llama.inputs()), logits(other, llama.inputs()))
    assert model.peft_config["default"].lora_alpha == lora_alpha
    assert [layer.lora_alpha for layer in layers_of(model)] == [layer.lora_alpha for layer in layers_of(other)]
    model.merge_adapter()
    assert torch.equal(reloaded(llama, model, tmp_path / "again"), logits(other, llama.inputs()))


def test_what_is_saved_right_after_the_swap_is_the_new_adapter(llama: Case, tmp_path):
    other = llama.model(init_seed=3, lora_alpha=13, rank_pattern={"v_proj": 2})
    other.save_pretrained(tmp_path / "other")
    model = llama.model(rank_pattern={"v_proj": 2})
    swap(model, tmp_path / "other")
    assert torch.equal(reloaded(llama, model, tmp_path / "again"), logits(other, llama.inputs()))


def test_scales_multiply_the_swapped_scaling(llama: Case, tmp_path):
    llama.model(lora_alpha=20).save_pretrained(tmp_path)
    model = llama.model()
    layer = layers_of(model)[0]
    layer.scale_layer(3.0)
    swap(model, tmp_path)
    layer.scale_layer(2.0)
    assert layer.scaling["default"] == 10.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 5.0


def test_scales_are_not_saved(llama: Case, tmp_path):
    model = llama.model()
    expected = logits(model, llama.inputs())
    for layer in layers_of(model):
        layer.scale_layer(0.3)
    assert torch.equal(reloaded(llama, model, tmp_path), expected)
    assert all(layer.scaling["default"] == pytest.approx(0.6) for layer in layers_of(model))


def test_a_scaling_written_by_hand_stays_in_its_layer(llama: Case, tmp_path):
    model = llama.model()
    layers_of(model)[0].scaling["default"] = 7.0
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].lora_alpha == 8
    assert [layer.scaling["default"] for layer in layers_of(model)] == [7.0, *[2.0] * 5]


def test_an_adapter_of_fewer_modules(llama: Case, tmp_path):
    other = llama.model(init_seed=3, lora_alpha=13, target_modules=["q_proj"])
    other.save_pretrained(tmp_path / "other")
    model = llama.model()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA-XS")
        swap(model, tmp_path / "other")
        assert torch.equal(logits(model, llama.inputs()), logits(other, llama.inputs()))
    assert torch.equal(reloaded(llama, model, tmp_path / "again"), logits(other, llama.inputs()))


def test_erased_magnitudes_are_refused(llama: Case, tmp_path):
    llama.model(use_edora=True, target_modules=["q_proj"]).save_pretrained(tmp_path)
    model = llama.model(use_edora=True)
    swap(model, tmp_path)
    with pytest.raises(ValueError, match="4 of 6 modules do not match"):
        logits(model, llama.inputs())


@pytest.mark.parametrize(
    "change",
    [
        {"use_rslora": True},
        {"sigma": "B"},
        {"loraxs_dropout": 0.1},
        {"r": 1},
        {"r": 6},
        {"rank_pattern": {"v_proj": 2}},
        {"save_basis": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("swapped_in", [True, False])
def test_what_cannot_be_exchanged_is_refused_before_anything_changes(llama: Case, change, swapped_in, tmp_path):
    plain, changed = llama.model(), llama.model(init_seed=3, **change)
    other, model = (changed, plain) if swapped_in else (plain, changed)
    other.save_pretrained(tmp_path)
    before = logits(model, llama.inputs())
    with pytest.raises(ValueError, match="Configs are incompatible"):
        swap(model, tmp_path)
    assert torch.equal(logits(model, llama.inputs()), before)
