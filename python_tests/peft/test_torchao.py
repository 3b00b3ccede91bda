"""torchao on the CPU, where it is installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from .models import CASES, assert_rows_as_alone, layers_of, logits, train

quantization = pytest.importorskip("torchao.quantization")

CASE = CASES["llama"]
SCHEMES = {
    "weights": quantization.Int8WeightOnlyConfig,
    "weights and activations": quantization.Int8DynamicActivationInt8WeightConfig,
}


@pytest.fixture(params=SCHEMES)
def scheme(request) -> Any:
    """A way to quantise."""
    return SCHEMES[request.param]()


@pytest.fixture
def folder(tmp_path):
    """The base model on disk."""
    CASE.base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantized(folder, scheme) -> nn.Module:
    """As a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(scheme)).eval()


def test_train_save_load(folder, scheme, tmp_path):
    model = get_peft_model(quantized(folder, scheme), CASE.config())
    assert model.get_model_status().quantization_backend == "torchao"
    train(model, CASE)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantized(folder, scheme), tmp_path / "adapter")
    assert torch.equal(logits(loaded, CASE.inputs()), logits(model, CASE.inputs()))


def test_gradients_are_those_of_the_dequantised_model(folder, scheme):
    model = get_peft_model(quantized(folder, scheme), CASE.config())
    reference = copy.deepcopy(model)
    for layer in layers_of(reference):
        layer.base_layer.weight = nn.Parameter(layer.frozen_weight(), requires_grad=False)
        layer.quantization_backend = None

    def gradients(model: nn.Module) -> list[torch.Tensor]:
        loss = model(**CASE.inputs(), labels=CASE.labels()).loss
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    for found, expected in zip(gradients(model), gradients(reference), strict=True):
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_mixed_batch_equals_each_row_alone(folder, scheme):
    model = get_peft_model(quantized(folder, scheme), CASE.config()).eval()
    model.add_adapter("second", CASE.config(r=6, init_seed=1))
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    # An activation between two steps of int8 is rounded up or down by the last bit of a sum. Another adapter's logits
    # differ by more than 1.
    steps = isinstance(scheme, SCHEMES["weights and activations"])
    assert_rows_as_alone(model, CASE, ["default", "__base__", "second", "sum"], tolerance=0.05 if steps else 1e-4)


def test_merge_quantises_once_more_and_unmerge_restores_every_bit(folder, scheme):
    model = get_peft_model(quantized(folder, scheme), CASE.config()).eval()
    before = logits(model, CASE.inputs())
    sums = [layer.frozen_weight() + layer.get_delta_weight("default") for layer in layers_of(model)]
    kind = type(layers_of(model)[0].get_base_layer().weight)
    model.merge_adapter()
    for layer, expected in zip(layers_of(model), sums, strict=True):
        assert type(layer.get_base_layer().weight) is kind
        assert (layer.stored_weight() - expected).norm() < 0.01 * expected.norm()
    torch.testing.assert_close(logits(model, CASE.inputs()), before, rtol=0.1, atol=0.3)
    model.unmerge_adapter()
    assert torch.equal(logits(model, CASE.inputs()), before)


def test_adapter_of_the_full_precision_base(folder, scheme, tmp_path):
    model = CASE.model()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="the base weights differ slightly"):
        loaded = PeftModel.from_pretrained(quantized(folder, scheme), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, CASE.inputs()), logits(model, CASE.inputs()), rtol=0.1, atol=0.3)


def test_model_quantised_by_torchao_itself_is_trained_but_not_merged(scheme):
    base = CASE.base()
    quantization.quantize_(base, scheme, lambda module, name: isinstance(module, nn.Linear) and "proj" in name)
    model = get_peft_model(base, CASE.config())
    train(model, CASE)
    before = logits(model, CASE.inputs())
    with pytest.raises(TypeError, match="merge: expected a model quantised through transformers' TorchAoConfig"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers_of(model))
    assert torch.equal(logits(model, CASE.inputs()), before)
