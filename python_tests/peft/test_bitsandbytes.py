"""bitsandbytes on the CPU, where it is installed."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from loraxs_ext.layers.repacking import is_repacked, unpack

from .models import CASES, assert_rows_as_alone, layers_of, logits, train

bnb = pytest.importorskip("bitsandbytes")


def _build() -> nn.Module:
    # 4-bit blocks have 64 entries.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=4, **tokens, **sizes))


CASE = dataclasses.replace(CASES["llama"], build=_build)
FORMATS = ["int8", "nf4", "nf4 nested", "fp4"]
# Whether this CPU makes bitsandbytes repack 4-bit weights.
REPACKS = bool(bnb.functional.has_avx512bf16())


def quantize(linear: nn.Linear, kind: str) -> nn.Module:
    """The layer in 8 or 4 bits."""
    weight, sizes = linear.weight.data.clone(), (linear.in_features, linear.out_features)
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": kind.split()[0], "compress_statistics": kind.endswith("nested")}
        new = bnb.nn.Linear4bit(*sizes, bias=False, **options)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    return new.to("cpu")


def quantized(kind: str, seed: int = 0) -> nn.Module:
    """The base model with its projections in 8 or 4 bits."""
    model = CASE.base(seed)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "proj" in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantize(linear, kind))
    return model.eval()


def adapted(kind: str, **changes) -> PeftModel:
    """The quantised model with an adapter."""
    return get_peft_model(quantized(kind), CASE.config(**changes)).eval()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Of all R, in training mode."""
    model.train()
    loss = model(**CASE.inputs(), labels=CASE.labels()).loss
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("kind", FORMATS)
def test_train_save_load(kind, tmp_path):
    model = adapted(kind)
    assert model.get_model_status().quantization_backend == ("bnb 8bit" if kind == "int8" else "bnb 4bit")
    train(model, CASE)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(kind), tmp_path)
    assert torch.equal(logits(loaded, CASE.inputs()), logits(model, CASE.inputs()))
    with pytest.raises(ValueError, match="another base model, revision or quantisation"):
        PeftModel.from_pretrained(CASE.base(seed=1), tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_mixed_batch_equals_each_row_alone(kind):
    model = adapted(kind)
    model.add_adapter("second", CASE.config(r=6, init_seed=1))
    assert_rows_as_alone(model, CASE, ["default", "__base__", "second", "default"])


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["int8", "fp4"])
def test_model_quantised_by_transformers(options, tmp_path):
    CASE.base().save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        quantization = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, device_map="cpu"
        )

    model = get_peft_model(prepare_model_for_kbit_training(load()), CASE.config()).eval()
    logits(model, CASE.inputs())
    train(model, CASE)
    found = logits(model, CASE.inputs())
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(model, CASE.inputs()), found)
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, CASE.inputs()), found, rtol=1e-4, atol=1e-4)


def test_weighted_sum():
    model = adapted("nf4")
    model.add_adapter("second", CASE.config(r=6, init_seed=1))
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    total = logits(model, CASE.inputs())
    for layer in layers_of(model):
        layer.scaling["default"] *= 0.5
        layer.scaling["second"] *= 0.5
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model, CASE.inputs()), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_merge_quantises_once_more_and_unmerge_restores_every_bit(kind):
    model = adapted(kind)
    before = logits(model, CASE.inputs())
    frozen = [layer.frozen_weight().clone() for layer in layers_of(model)]
    deltas = [layer.get_delta_weight("default") for layer in layers_of(model)]
    with pytest.warns(UserWarning, match="rounding the merged weight changes") if kind != "int8" else nullcontext():
        model.merge_adapter()
    for layer, weight, delta in zip(layers_of(model), frozen, deltas, strict=True):
        error = (layer.stored_weight() - weight - delta).norm() / (weight + delta).norm()
        assert error < (0.02 if kind == "int8" else 0.15)
    assert not torch.allclose(logits(model, CASE.inputs()), before, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(m.frozen_weight(), w) for m, w in zip(layers_of(model), frozen, strict=True))
    assert torch.equal(logits(model, CASE.inputs()), before)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapter_of_the_full_precision_base(kind, tmp_path):
    model = CASE.model()
    model.save_pretrained(tmp_path)
    if kind == "nf4":
        with pytest.raises(ValueError, match="another base model, revision or quantisation"):
            PeftModel.from_pretrained(quantized(kind), tmp_path)
        return
    # The anchors in the cache find the old basis in the rounded weights, and tell how far apart these are.
    with pytest.warns(UserWarning, match="the base weights differ slightly|quantised"):
        loaded = PeftModel.from_pretrained(quantized(kind), tmp_path)
    torch.testing.assert_close(logits(loaded, CASE.inputs()), logits(model, CASE.inputs()), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4"])
def test_unpacking_restores_every_bit(kind):
    # By hand: the conversion itself runs on any CPU.
    layer = adapted(kind, target_modules=["q_proj"]).base_model.model.model.layers[0].self_attn.q_proj
    base = layer.base_layer
    weight, x = layer.frozen_weight().clone(), torch.randn(3, 64, requires_grad=True)
    layer(x)  # with a gradient it is not repacked, but its scales are noted
    convert = bnb.functional._convert_weight_packed_for_cpu
    base.weight.data, base.weight.quant_state = convert(base.weight.data, base.weight.quant_state)
    assert is_repacked(base)
    unpack(base)
    assert not is_repacked(base) and torch.equal(layer.frozen_weight(), weight)
    # A stranger's weight comes back as it is computed with: scales in bf16.
    stranger = quantize(nn.Linear(64, 64), kind)
    weight = bnb.functional.dequantize_4bit(stranger.weight.data, stranger.weight.quant_state)
    stranger.weight.data, _ = convert(stranger.weight.data, stranger.weight.quant_state)
    unpack(stranger)
    found = bnb.functional.dequantize_4bit(stranger.weight.data, stranger.weight.quant_state)
    assert 0 < (found - weight).norm() / weight.norm() < 4e-3


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested"])
def test_adapter_before_the_first_evaluation(kind, tmp_path):
    never = adapted(kind, r=4)
    expected = gradients(never)
    model = adapted(kind, r=4)
    evaluated = logits(model, CASE.inputs())
    bases = [layer.base_layer for layer in layers_of(model)]
    assert all(is_repacked(base) is REPACKS for base in bases)
    # Training goes on as if there had been no evaluation.
    for found, gradient in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)
    model.eval()
    # Saving changes nothing, and saves what was quantised.
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model, CASE.inputs()), evaluated)
    saved, original = model.state_dict(), never.state_dict()
    assert all(torch.equal(saved[key], original[key]) for key in original if "base_layer" in key)
    # A second adapter, of a larger rank, reads the weight once more.
    assert torch.equal(logits(model, CASE.inputs()), evaluated)
    model.add_adapter("second", CASE.config(r=8, init_seed=1))
    alone = adapted(kind, r=8, init_seed=1)
    for ours, theirs in zip(layers_of(model), layers_of(alone), strict=True):
        assert torch.equal(ours.frozen_weight(), theirs.frozen_weight())
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, CASE.inputs()), logits(alone, CASE.inputs()), rtol=0.02, atol=0.02)
    # So does a merge.
    logits(model, CASE.inputs())
    assert all(is_repacked(base) is REPACKS for base in bases)
    model.merge_adapter()
    alone.merge_adapter()
    torch.testing.assert_close(logits(model, CASE.inputs()), logits(alone, CASE.inputs()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested"])
def test_adapter_after_the_first_evaluation(kind, tmp_path):
    first = adapted(kind)
    first.save_pretrained(tmp_path)
    base = quantized(kind)
    before = logits(base, CASE.inputs())
    assert all(is_repacked(m) is REPACKS for m in base.modules() if isinstance(m, bnb.nn.Linear4bit))
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, CASE.inputs()), before, rtol=0.02, atol=0.02)
    torch.testing.assert_close(logits(model, CASE.inputs()), logits(first, CASE.inputs()), rtol=0.02, atol=0.05)
    for found, gradient in zip(gradients(model), gradients(first.train()), strict=True):
        assert (found - gradient).norm() < 0.05 * gradient.norm()
