"""bitsandbytes on the CPU, where it is installed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .models import CASES, layers_of, logits, train

bnb = pytest.importorskip("bitsandbytes")


def _build() -> nn.Module:
    # 4-bit blocks have 64 entries.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=4, pad_token_id=0, **sizes))


CASE = dataclasses.replace(CASES["llama"], build=_build)


def quantized(bits: int) -> nn.Module:
    """The base model with its projections in 8 or 4 bits."""
    model = CASE.base()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "proj" in name:
            weight = linear.weight.data.clone()
            if bits == 8:
                new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_train_save_load(bits, tmp_path):
    model = get_peft_model(quantized(bits), CASE.config())
    assert model.get_model_status().quantization_backend == f"bnb {bits}bit"
    train(model, CASE)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(bits), tmp_path)
    assert torch.equal(logits(loaded, CASE.inputs()), logits(model, CASE.inputs()))
    with pytest.raises(ValueError, match="another base model, revision or quantisation"):
        PeftModel.from_pretrained(CASE.base(seed=1), tmp_path)


def test_merge_and_unmerge():
    model = get_peft_model(quantized(8), CASE.config()).eval()
    adapted = logits(model, CASE.inputs())
    model.merge_adapter()
    torch.testing.assert_close(logits(model, CASE.inputs()), adapted, rtol=0.1, atol=0.5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, CASE.inputs()), adapted)
    assert not any(layer.merged for layer in layers_of(model))
