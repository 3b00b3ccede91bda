"""Several adapters in one model: adding, switching, deleting, combining, patterns."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict

from loraxs_ext.peft import LoraXSConfig

from .models import CASES, Case, layers_of, logits, train


def same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_wider_second_adapter_changes_nothing_of_the_first(case: Case):
    model = case.model()
    before, rows = logits(model, case.inputs()), layers_of(model)[0].loraxs_A.clone()
    model.add_adapter("wide", case.config(r=9))
    layer = layers_of(model)[0]
    assert layer.basis_rank == 9 and torch.equal(layer.loraxs_A[:4], rows)
    assert torch.equal(logits(model, case.inputs()), before)
    model.set_adapter("wide")
    assert not torch.allclose(logits(model, case.inputs()), before, atol=1e-3)
    train(model, case)
    model.set_adapter("default")
    assert torch.equal(logits(model, case.inputs()), before)


def test_a_narrower_second_adapter_uses_the_same_basis(llama: Case):
    model = llama.model(r=6)
    pointer = layers_of(model)[0].loraxs_A.data_ptr()
    model.add_adapter("narrow", llama.config(r=2))
    model.set_adapter("narrow")
    alone = llama.model(r=2)
    same(logits(model, llama.inputs()), logits(alone, llama.inputs()))
    assert layers_of(model)[0].loraxs_A.data_ptr() == pointer


def test_other_layers_for_the_second_adapter(llama: Case):
    model = llama.model(target_modules=["q_proj"])
    model.add_adapter("mlp", llama.config(target_modules=["up_proj"]))
    model.set_adapter("mlp")
    same(logits(model, llama.inputs()), logits(llama.model(target_modules=["up_proj"]), llama.inputs()))


def test_deleting(case: Case):
    model = case.model()
    model.add_adapter("other", case.config(r=6, init_seed=1))
    model.set_adapter("other")
    other = logits(model, case.inputs())
    model.delete_adapter("default")
    assert torch.equal(logits(model, case.inputs()), other)
    assert all(set(layer.loraxs_R) == set(layer.scaling) == {"other"} for layer in layers_of(model))
    model.delete_adapter("other")
    assert not any(layer.loraxs_R for layer in layers_of(model))


def test_an_adapter_that_is_merged_cannot_be_deleted(llama: Case):
    model = llama.model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")


def test_two_active_adapters_are_their_sum(case: Case):
    # Only bodies can be summed: a classifier of its own for every adapter would get in the way.
    options = {"task_type": None}
    model = case.model(r=3, **options)
    model.add_adapter("other", case.config(r=5, init_seed=1, **options))
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, case.inputs())
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.base_model.set_adapter("sum")
    same(logits(model, case.inputs()), both)


@pytest.mark.parametrize("kind", ["linear", "svd", "cat"])
def test_weighted_sum_is_exact(llama: Case, kind):
    model = llama.model(r=3, lora_alpha=6)
    model.add_adapter("other", llama.config(r=5, init_seed=1, use_rslora=True, rank_pattern={"v_proj": 2}))
    model.add_weighted_adapter(["default", "other"], [0.7, -1.5], "sum", combination_type=kind)
    for layer in layers_of(model):
        expected = 0.7 * layer.get_delta_weight("default") - 1.5 * layer.get_delta_weight("other")
        same(layer.get_delta_weight("sum"), expected, 1e-6)
        assert layer.scaling["sum"] == 1.0 and layer.r["sum"] == max(layer.r["default"], layer.r["other"])
        assert not layer.loraxs_R["sum"].weight.requires_grad


def test_weighted_sum_can_be_saved(llama: Case, tmp_path):
    model = llama.model(rank_pattern={"v_proj": 2})
    model.add_adapter("other", llama.config(r=5, init_seed=1, target_modules=["q_proj", "o_proj"]))
    model.add_weighted_adapter(["default", "other"], [1.0, 2.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(llama.base(), tmp_path / "sum")
    same(logits(loaded, llama.inputs()), logits(model, llama.inputs()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["default"], [1.0], "sum", "ties"), "combination_type: expected 'linear', 'svd' or 'cat', got 'ties'"),
        ((["nobody"], [1.0], "sum"), "got 'nobody'"),
        ((["default"], [1.0, 2.0], "sum"), "weights: expected one per adapter, got 2 for 1"),
    ],
)
def test_weighted_sum_refuses_what_it_cannot_do(llama: Case, arguments, message):
    with pytest.raises(ValueError, match=message):
        llama.model().add_weighted_adapter(*arguments)


def test_heads_cannot_be_summed(bert: Case):
    model = bert.model()
    model.add_adapter("other", bert.config())
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_patterns_and_rslora(llama: Case):
    model = llama.model(
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={r"layers.1\..*q_proj": 16, "v_proj": 6},
    )
    ranks = {layer.key: (layer.r["default"], layer.scaling["default"]) for layer in layers_of(model)}
    assert ranks["model.layers.0.self_attn.q_proj"] == (4, 4.0)
    assert ranks["model.layers.0.self_attn.v_proj"] == (2, 6 / 2**0.5)


def test_rank_larger_than_a_layer_is_clamped(llama: Case, tmp_path):
    model = llama.model(r=40, lora_alpha=40)
    ranks = {layer.key.rpartition(".")[2]: layer.r["default"] for layer in layers_of(model)}
    assert ranks == {"q_proj": 32, "v_proj": 16, "down_proj": 32}
    assert {layer.scaling["default"] for layer in layers_of(model)} == {1.0}
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(PeftModel.from_pretrained(llama.base(), tmp_path), llama.inputs()), logits(model, llama.inputs())
    )


@pytest.mark.parametrize("change", [{"sigma": "B"}, {"vectors": "bottom"}, {"svd_seed": 1}], ids=str)
def test_adapters_of_one_model_share_the_recipe(llama: Case, change):
    model = llama.model()
    with pytest.raises(ValueError, match="recipe: expected that of adapter 'default'"):
        model.add_adapter("other", llama.config(**change))
    assert set(model.peft_config) == {"default"}
    model.add_adapter("other", llama.config())


def test_the_last_adapter_takes_the_basis_along(llama: Case):
    model = llama.model()
    model.delete_adapter("default")
    assert not any(layer.basis_rank for layer in layers_of(model))
    model.add_adapter("default", llama.config(sigma="B", vectors="bottom"))
    model.set_adapter("default")
    same(logits(model, llama.inputs()), logits(llama.model(sigma="B", vectors="bottom"), llama.inputs()), 1e-6)


@pytest.mark.parametrize("sigma", ["A", "sqrt", "B"])
@pytest.mark.parametrize("vectors", ["top", "middle", "bottom", "random"])
def test_recipes(llama: Case, sigma, vectors, tmp_path):
    model = llama.model(sigma=sigma, vectors=vectors)
    weight, layer = None, layers_of(model)[0]
    a, b = layer.get_basis("default")
    weight = layer.frozen_weight()
    # Whatever the split, b a is the part of W in the chosen singular directions.
    left = torch.linalg.qr(b)[0]
    same(b @ a, left @ left.mT @ weight, 1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.base(), tmp_path)
    assert loaded.peft_config["default"].sigma == sigma
    assert torch.equal(logits(loaded, llama.inputs()), logits(model, llama.inputs()))


def test_init_differs_between_modules_and_repeats(llama: Case):
    first, second = llama.model(), llama.model()
    cores = [layer.loraxs_R["default"].weight for layer in layers_of(first)]
    assert all(torch.equal(c, o.loraxs_R["default"].weight) for c, o in zip(cores, layers_of(second), strict=True))
    assert not torch.equal(cores[0], cores[1])


def test_tied_weights_share_one_basis(llama: Case):
    base = llama.base()
    base.model.layers[1].self_attn.q_proj.weight = base.model.layers[0].self_attn.q_proj.weight
    model = get_peft_model(base, llama.config(target_modules=["q_proj"]))
    first, second = layers_of(model)
    assert first.loraxs_A.data_ptr() == second.loraxs_A.data_ptr()
    adapted = logits(model, llama.inputs())
    model.merge_adapter()
    same(logits(model, llama.inputs()), adapted)
    model.unmerge_adapter()
    assert first.base_layer.weight is second.base_layer.weight
    assert torch.equal(logits(model, llama.inputs()), adapted)


def test_a_lora_model_can_be_adapted_on_top(llama: Case):
    lora = get_peft_model(llama.base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = logits(lora, llama.inputs())
    with pytest.warns(UserWarning, match="second time"):
        model = get_peft_model(lora.base_model.model, llama.config(target_modules=["q_proj"], init_weights="zeros"))
    assert len(layers_of(model)) == 2
    same(logits(model, llama.inputs()), expected)
    layers_of(model)[0].loraxs_R["default"].weight.data.normal_()
    assert not torch.allclose(logits(model, llama.inputs()), expected, atol=1e-2)


def test_modules_that_cannot_be_adapted_are_named(llama: Case):
    message = r"layers.0.input_layernorm: expected a linear layer, or a linear module .* got LlamaRMSNorm"
    with pytest.raises(TypeError, match=message):
        llama.model(target_modules=["input_layernorm"])


def test_attention_that_bypasses_its_projection_is_refused():
    model = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2), "head": torch.nn.Linear(8, 8)})
    with pytest.raises(TypeError, match="attention.out_proj: expected a layer that is called"):
        get_peft_model(model, LoraXSConfig(r=2, target_modules=["out_proj"]))
    assert len(layers_of(get_peft_model(model, LoraXSConfig(r=2, target_modules=["head"])))) == 1


@pytest.mark.parametrize(
    "options, count",
    [
        ({"target_modules": r".*layers\.0.*\.(q|k)_proj"}, 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1.*"}, 2),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
    ],
    ids=str,
)
def test_targets(llama: Case, options, count):
    assert len(layers_of(llama.model(**options))) == count


def test_layout_follows_from_the_type_of_the_layer(llama: Case):
    with pytest.warns(UserWarning, match="fan_in_fan_out: expected False"):
        model = llama.model(fan_in_fan_out=True)
    same(logits(model, llama.inputs()), logits(llama.model(), llama.inputs()))


def test_peft_converts_it_to_lora(case: Case):
    model = case.model(task_type=None)
    config, tensors = convert_to_lora(model, rank=4)
    lora = get_peft_model(case.base(), config)
    set_peft_model_state_dict(lora, tensors)
    same(logits(lora.eval(), case.inputs()), logits(model, case.inputs()), 1e-3)


def test_trainable_tokens(llama: Case, tmp_path):
    model = llama.model(trainable_token_indices=[3, 4])
    train(model, llama)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.base(), tmp_path)
    assert torch.equal(logits(loaded, llama.inputs()), logits(model, llama.inputs()))


def test_merge_warns_once_with_the_worst_layer(llama: Case):
    model = llama.model(dtype=torch.bfloat16, init_weights=True, init_std=1e-4)
    with pytest.warns(UserWarning, match="rounding the merged weight") as caught:
        model.merge_adapter()
    assert sum("rounding the merged weight" in str(w.message) for w in caught) == 1


def test_cases_are_what_they_claim():
    assert {name for name, case in CASES.items() if case.generates} == {"llama", "gpt2", "t5"}
