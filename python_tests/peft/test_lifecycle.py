"""What every PEFT method must do, on every architecture."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from loraxs_ext.peft import LoraXSConfig

from ..copies import COPIERS
from .models import Case, layers_of, logits, train


def same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_only_r_is_trainable_and_training_moves_only_r(case: Case):
    model = case.model(init_weights=True)
    head = {"classifier", "score"} if case.task == "SEQ_CLS" else set()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".loraxs_R.default.weight" in n or any(h in n for h in head) for n in trainable)
    assert sum(".loraxs_R." in n for n in trainable) == len(layers_of(model))
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, case)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trainable), name


def test_fresh_adapter_is_almost_the_base_and_zeros_are_the_base(case: Case):
    inputs = case.inputs()
    base = logits(case.base(), inputs)
    same(logits(case.model(init_weights="zeros"), inputs), base, 1e-5)
    same(logits(case.model(init_weights=True), inputs), base, 1e-3)
    assert not torch.allclose(logits(case.model(init_weights=False), inputs), base, atol=1e-2)


def test_save_and_load(case: Case, tmp_path):
    model = case.model()
    train(model, case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_load_with_low_cpu_mem_usage(case: Case, tmp_path):
    model = case.model(dtype=torch.bfloat16)
    train(model, case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


def test_disable_adapter_gives_the_base_and_unfreezes_nothing(case: Case):
    model = case.model()
    inputs = case.inputs()
    adapted = logits(model, inputs)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(case.base(), inputs))
        assert {n for n, p in model.named_parameters() if p.requires_grad} <= before
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    assert torch.equal(logits(model, inputs), adapted)


def test_merge_and_unmerge(case: Case):
    model = case.model()
    inputs = case.inputs()
    adapted, bits = logits(model, inputs), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    same(logits(model, inputs), adapted)
    assert all(layer.merged_adapters == ["default"] for layer in layers_of(model))
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), adapted)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_merge_and_unload(case: Case):
    model = case.model()
    adapted = logits(model, case.inputs())
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers_of(merged) and type(merged) is type(case.base())
    same(logits(merged, case.inputs()), adapted)


def test_unload_returns_the_base(case: Case):
    base = case.model().unload()
    assert not layers_of(base)
    assert torch.equal(logits(base, case.inputs()), logits(case.base(), case.inputs()))


def test_checkpoint_saved_while_merged_is_the_adapter(case: Case, tmp_path):
    model = case.model()
    adapted = logits(model, case.inputs())
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(case.base(), tmp_path), case.inputs()), adapted)


@pytest.mark.parametrize("copier", COPIERS)
def test_copies_are_independent(case: Case, copier):
    model = case.model()
    expected = logits(model, case.inputs())
    twin = copier(model)
    assert torch.equal(logits(twin, case.inputs()), expected)
    for layer in layers_of(model):
        layer.loraxs_R["default"].weight.data.zero_()
    assert torch.equal(logits(twin, case.inputs()), expected)
    twin.add_adapter("wide", case.config(r=6))
    assert layers_of(twin)[0].basis_rank == 6 and layers_of(model)[0].basis_rank == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_base_dtypes(case: Case, dtype, tmp_path):
    model = case.model(dtype=dtype)
    expected_r = torch.float64 if dtype == torch.float64 else torch.float32
    assert {layer.loraxs_R["default"].weight.dtype for layer in layers_of(model)} == {expected_r}
    train(model, case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(dtype=dtype), tmp_path)
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


def test_model_cast_after_injection(case: Case):
    model = case.model().to(torch.bfloat16)
    exact = logits(case.model(), case.inputs())
    same(logits(model, case.inputs()).float(), exact, 0.15)
    assert torch.isfinite(logits(model.double(), case.inputs())).all()


def test_bf16_autocast(case: Case):
    model = case.model()
    exact = logits(model, case.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        train(model, case, lr=0.0)
        rounded = logits(model, case.inputs())
    same(rounded.float(), exact, 0.15)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(case: Case, reentrant):
    def gradients(checkpointing: bool):
        model = case.model(loraxs_dropout=0.2)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        train(model, case, steps=1, lr=0.0)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "loraxs" in n}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys() and len(plain) > 0
    for name in plain:
        same(recomputed[name], plain[name], 1e-6)


def test_all_linear(case: Case):
    model = case.model(target_modules="all-linear", r=3)
    expected = sum(type(m).__name__ in ("Linear", "Conv1D") for n, m in case.base().named_modules() if _is_body(n))
    assert len(layers_of(model)) == expected
    model.add_adapter("again", case.config(target_modules="all-linear"))
    assert len(layers_of(model)) == expected


def _is_body(name: str) -> bool:
    return not any(head in name for head in ("classifier", "lm_head"))


def test_status(case: Case):
    model = case.model()
    status = model.get_model_status()
    assert status.peft_types == {"default": "LORAXS"}
    assert status.enabled and status.active_adapters == status.available_adapters == ["default"]
    ours = [layer for layer in model.get_layer_status() if layer.module_type == "loraxs.LoraXSLinear"]
    assert len(ours) == len(layers_of(model))
    assert all(s.available_adapters == ["default"] and s.requires_grad == {"default": True} for s in ours)


@pytest.mark.parametrize("bias", ["all", "loraxs_only"])
def test_bias_is_trained_and_saved(case: Case, bias, tmp_path):
    model = case.model(bias=bias)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")]
    if bias == "loraxs_only":
        assert all("base_layer.bias" in n or "classifier" in n for n in trainable)
    train(model, case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


def test_default_targets(case: Case):
    assert layers_of(get_peft_model(case.base(), LoraXSConfig(task_type=case.task)))
