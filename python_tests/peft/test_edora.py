"""EDoRA in whole models: the life cycle of an adapter with a magnitude, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from .models import Case, layers_of, logits, train

NORMS = ["detached", "differentiated"]


def edora(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PeftModel:
    """A model whose R and m both clearly change it."""
    model = case.model(dtype=dtype, use_edora=True, **changes)
    stretch(model, "default", seed)
    return model


def stretch(model: PeftModel, adapter: str, seed: int = 0) -> None:
    """Other lengths for all rows, as training would find them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model):
            m = layer.loraxs_magnitude[adapter].weight
            m.mul_((0.6 + torch.rand(len(m), generator=generator)).to(m))


def same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 5e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def dense(case: Case, model: PeftModel, adapter: str = "default") -> torch.nn.Module:
    """The base model in fp64 with W' = (m / ‖W + sBRA‖) (W + sBRA) in the place of every W, from its definition."""
    exact = case.base(dtype=torch.float64)
    for layer in layers_of(model):
        weight = layer.frozen_weight().double()
        a, b = (part.double() for part in layer.get_basis(adapter))
        moved = weight + layer.scaling[adapter] * b @ layer.get_R(adapter).double() @ a
        moved *= (layer.loraxs_magnitude[adapter].weight.double() / moved.norm(dim=1))[:, None]
        target = exact.get_submodule(layer.key)
        target.weight.data = moved.mT.contiguous() if layer.fan_in_fan_out else moved.detach()
    return exact


def test_it_is_the_rescaled_weight(case: Case):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        model = edora(case, dtype)
        expected = logits(dense(case, model), case.inputs())
        torch.testing.assert_close(logits(model, case.inputs()).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", NORMS)
def test_r_and_m_are_trained_and_nothing_else(case: Case, norm):
    model = edora(case, edora_norm=norm)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n}
    assert {n.split(".")[-3] for n in trainable} == {"loraxs_R", "loraxs_magnitude"}
    assert len(trainable) == 2 * len(layers_of(model))
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, case)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_a_fresh_adapter_is_almost_the_base(case: Case):
    model = case.model(use_edora=True, init_weights=True)
    for layer in layers_of(model):
        lengths = layer.frozen_weight().double().norm(dim=1)
        torch.testing.assert_close(layer.loraxs_magnitude["default"].weight.double(), lengths, rtol=1e-6, atol=0)
    same(logits(model, case.inputs()), logits(case.base(), case.inputs()), 1e-3)
    zeros = case.model(use_edora=True, init_weights="zeros")
    same(logits(zeros, case.inputs()), logits(case.base(), case.inputs()), 2e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_of_r_and_m_is_the_adapter(case: Case, tmp_path, low_cpu_mem_usage):
    model = edora(case)
    train(model, case)
    model.save_pretrained(tmp_path)
    kinds = {key.split(".loraxs_")[1] for key in load_file(tmp_path / "adapter_model.safetensors") if "loraxs" in key}
    assert kinds == {"R.weight", "R.sketch", "magnitude.weight"}
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


def test_disable_gives_the_base_and_unfreezes_nothing(case: Case):
    model = edora(case)
    adapted = logits(model, case.inputs())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert torch.equal(logits(model, case.inputs()), logits(case.base(), case.inputs()))
        assert {n for n, p in model.named_parameters() if p.requires_grad} <= trainable
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(logits(model, case.inputs()), adapted)


def test_merge_unmerge_and_unload(case: Case):
    model = edora(case)
    adapted, bits = logits(model, case.inputs()), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    same(logits(model, case.inputs()), adapted)
    same(logits(model, case.inputs()), adapted)
    model.unmerge_adapter()
    assert torch.equal(logits(model, case.inputs()), adapted)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers_of(merged)
    same(logits(merged, case.inputs()), adapted)


def test_merged_exactly_in_fp64(llama: Case):
    model = edora(llama, torch.float64)
    adapted = logits(model, llama.inputs())
    torch.testing.assert_close(logits(model.merge_and_unload(), llama.inputs()), adapted, rtol=1e-12, atol=1e-12)


def test_mixed_batch_is_each_row_alone(case: Case):
    model = edora(case)
    model.add_adapter("plain", case.config(r=6, init_seed=1))
    model.add_adapter("other", case.config(r=2, init_seed=2, use_edora=True))
    stretch(model, "other", 1)
    names = ["plain", "default", "__base__", "other", "default"]
    inputs = case.inputs(rows=len(names))
    mixed = logits(model.eval(), inputs, adapter_names=names)
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            same(mixed[row : row + 1], logits(case.base(), alone))
        else:
            model.set_adapter(name)
            same(mixed[row : row + 1], logits(model, alone))


def test_adapters_of_other_ranks_and_kinds_live_together(case: Case):
    model = edora(case)
    alone = logits(model, case.inputs())
    model.add_adapter("wide", case.config(r=9, init_seed=3))
    same(logits(model, case.inputs()), alone, 1e-5)
    model.set_adapter("wide")
    same(logits(model, case.inputs()), logits(case.model(r=9, init_seed=3), case.inputs()))
    model.delete_adapter("wide")
    model.set_adapter("default")
    same(logits(model, case.inputs()), alone, 1e-5)
    model.add_adapter("plain", case.config())
    model.delete_adapter("default")
    assert not any(layer.loraxs_magnitude or layer.loraxs_norms for layer in layers_of(model))


def test_several_active_adapters_add_their_updates(llama: Case):
    model = edora(llama)
    model.add_adapter("plain", llama.config(r=6, init_seed=1))
    model.add_adapter("other", llama.config(r=2, init_seed=2, use_edora=True))
    stretch(model, "other", 1)
    model.base_model.set_adapter(["default", "plain", "other"])
    together = logits(model, llama.inputs())
    summed = llama.base()
    for layer in layers_of(model):
        deltas = sum(layer.get_delta_weight(name) for name in ("default", "plain", "other"))
        summed.get_submodule(layer.key).weight.data += deltas
    same(together, logits(summed, llama.inputs()), 2e-4)
    model.merge_adapter()
    same(logits(model, llama.inputs()), together, 2e-4)


def test_add_weighted_adapter_refuses(llama: Case):
    model = edora(llama)
    with pytest.raises(ValueError, match="adapters: expected adapters without a magnitude.* got 'default'"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_base_dtypes(case: Case, dtype, tmp_path):
    model = edora(case, dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {layer.loraxs_magnitude["default"].weight.dtype for layer in layers_of(model)} == {expected}
    train(model, case)
    assert torch.isfinite(logits(model, case.inputs())).all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(dtype=dtype), tmp_path)
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


def test_model_cast_after_injection(llama: Case):
    model = edora(llama)
    exact = logits(model, llama.inputs())
    same(logits(model.to(torch.bfloat16), llama.inputs()).float(), exact, 0.2)
    wide = model.double()
    torch.testing.assert_close(
        logits(wide, llama.inputs()), logits(_dense_of(wide, llama), llama.inputs()), rtol=1e-12, atol=1e-12
    )


def _dense_of(model: PeftModel, case: Case) -> torch.nn.Module:
    merged = copy.deepcopy(model).merge_and_unload()
    assert next(merged.parameters()).dtype == torch.float64
    return merged


def test_bf16_autocast(case: Case):
    model = edora(case)
    exact = logits(model, case.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        train(model, case, lr=0.0)
        rounded = logits(model, case.inputs())
    same(rounded.float(), exact, 0.2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(case: Case, dropout):
    def gradients(checkpointing: bool):
        model = edora(case, loraxs_dropout=dropout)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        train(model, case, steps=1, lr=0.0)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "loraxs" in n}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys() and any("magnitude" in name for name in plain)
    for name in plain:
        same(recomputed[name], plain[name], 1e-5)


def test_hotswap(llama: Case, tmp_path):
    first, second = edora(llama), edora(llama, seed=1, init_seed=4)
    second.save_pretrained(tmp_path / "second")
    hotswap_adapter(first, str(tmp_path / "second"), adapter_name="default")
    assert torch.equal(logits(first, llama.inputs()), logits(second, llama.inputs()))
    llama.model().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="use_edora"):
        hotswap_adapter(first, str(tmp_path / "plain"), adapter_name="default")


@pytest.mark.parametrize("bias", ["all", "loraxs_only"])
def test_bias_is_trained_and_saved(bert: Case, bias, tmp_path):
    model = edora(bert, bias=bias)
    train(model, bert)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert.base(), tmp_path)
    assert torch.equal(logits(loaded, bert.inputs()), logits(model, bert.inputs()))


def test_copies_are_independent(llama: Case):
    model = edora(llama)
    expected = logits(model, llama.inputs())
    twin = copy.deepcopy(model)
    stretch(model, "default", 3)
    assert torch.equal(logits(twin, llama.inputs()), expected)


def test_norms_are_neither_saved_nor_broadcast(llama: Case):
    model = edora(llama)
    assert not any("loraxs_norms" in key for key in model.state_dict())
    norms = {name for name, _ in model.named_buffers() if "loraxs_norms" in name}
    assert norms and norms <= set(model._ddp_params_and_buffers_to_ignore)


def test_a_basis_with_turned_signs(llama: Case, tmp_path):
    model = edora(llama)
    model.save_pretrained(tmp_path)
    expected = logits(model, llama.inputs())
    # The same singular vectors with other signs: R is turned, m is not.
    loaded = get_peft_model(llama.base(), llama.config(use_edora=True))
    for layer in layers_of(loaded):
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None]
        layer.set_basis(layer.loraxs_A * signs, layer.loraxs_Bt * signs)
        layer.core("default").record(layer.core("default").recorded_sketch * 0 + torch.nan, *layer.basis_rows(4))
    loaded.load_adapter(tmp_path, "loaded")
    loaded.set_adapter("loaded")
    same(logits(loaded.eval(), llama.inputs()), expected, 1e-4)
    turned = [a.get_R("loaded") for a in layers_of(loaded)]
    assert not any(torch.equal(r, m.get_R("default")) for r, m in zip(turned, layers_of(model), strict=True))


def test_conversion_to_lora_takes_the_whole_update(llama: Case):
    model = edora(llama)
    config, weights = convert_to_lora(model, rank=1.0)
    converted = get_peft_model(llama.base(), config)
    set_peft_model_state_dict(converted, weights)
    same(logits(converted.eval(), llama.inputs()), logits(model, llama.inputs()), 1e-3)
