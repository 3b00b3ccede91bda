"""Methods and base layers that meet: what works together does, the rest is refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import Trainer

from .models import CASES, Case, layers_of, logits, train
from .test_edora import dense, same, stretch
from .test_experts import MOE
from .test_training import arguments, rows

METHODS = {
    "EDoRA": {"use_edora": True},
    "TinyLoRA": {"use_tinylora": True, "u": 6, "weight_tying": 0.5},
    "both": {"use_edora": True, "use_tinylora": True, "u": 6},
}


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request) -> dict:
    return request.param


def equal(one: PeftModel, other: PeftModel) -> bool:
    """Whether everything that is saved is the same, bit for bit."""
    states = [get_peft_model_state_dict(model) for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_trainer_resumes_where_it_stopped(method, tmp_path):
    bert, data = CASES["bert"], rows(CASES["bert"])
    whole = bert.model(**method)
    Trainer(whole, arguments(tmp_path / "whole"), train_dataset=data).train()
    assert not equal(whole, bert.model(**method))
    resumed = bert.model(**method)
    Trainer(resumed, arguments(tmp_path / "again"), train_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert equal(resumed, whole)


def test_tinylora_with_magnitudes(llama: Case, tmp_path):
    model = llama.model(**METHODS["both"])
    stretch(model, "default")
    same(logits(model, llama.inputs()), logits(dense(llama, model), llama.inputs()).float())
    train(model, llama)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.base(), tmp_path)
    same(logits(loaded, llama.inputs()), logits(model, llama.inputs()))
    merged = loaded.merge_and_unload()
    same(logits(merged, llama.inputs()), logits(model, llama.inputs()))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["q_proj", "embed_tokens"]], ids=str)
def test_magnitudes_need_linear_layers(llama: Case, targets):
    with pytest.raises(TypeError, match="use_edora: model.embed_tokens: expected a linear layer, got Embedding"):
        llama.model(use_edora=True, target_modules=targets)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_edora": True}, "use_edora: .*experts.*: expected a linear layer"),
        ({"use_tinylora": True}, "use_tinylora: .*experts.*: expected one matrix, got a stack of 3"),
    ],
    ids=["EDoRA", "TinyLoRA"],
)
def test_experts_take_lora_xs_only(changes, message):
    with pytest.raises(TypeError, match=message):
        MOE["mixtral"].model(**changes)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_relatives_over_bitsandbytes(method, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    from .test_bitsandbytes import CASE, quantized

    model = get_peft_model(quantized(kind), CASE.config(**method))
    train(model, CASE)
    assert all(layer.quantization_backend is not None for layer in layers_of(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(kind), tmp_path)
    torch.testing.assert_close(logits(loaded, CASE.inputs()), logits(model, CASE.inputs()), rtol=1e-5, atol=1e-5)
    names = ["default", "__base__", "default", "__base__"]
    mixed = logits(model, CASE.inputs(), adapter_names=names)
    same(mixed[::2], logits(model, CASE.inputs())[::2])
