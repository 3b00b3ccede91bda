"""adapter_names in forward and generate: every row as if it were alone."""

from __future__ import annotations

import pytest
import torch
from peft.utils import ModulesToSaveWrapper

from .models import CASES, Case, alone, logits

NAMES = ["default", "__base__", "other", "default"]


@pytest.fixture
def model(case: Case):
    model = case.model()
    model.add_adapter("other", case.config(r=6, lora_alpha=9, use_rslora=True, init_seed=1))
    return model.eval()


def test_forward(case: Case, model):
    inputs = case.inputs(len(NAMES))
    mixed = logits(model, inputs, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        single = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = alone(model, name, lambda single=single: logits(model, single))
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["greedy", "beams", "returned"],
)
def test_generate(case: Case, model, options):
    if not case.generates:
        pytest.skip("a classifier does not generate")
    options = {**options, "max_new_tokens": 5, "do_sample": False}
    ids = case.inputs(len(NAMES))["input_ids"]
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    returned = options.get("num_return_sequences", 1)
    outputs = set()
    for row, name in enumerate(NAMES):
        expected = alone(model, name, lambda row=row: model.generate(input_ids=ids[row : row + 1], **options))
        assert torch.equal(mixed[row * returned : (row + 1) * returned], expected)
        outputs.add(tuple(expected[0].tolist()))
    assert len(outputs) > 1


def test_heads_are_routed_too(bert: Case):
    model = bert.model()
    model.add_adapter("other", bert.config(init_weights="zeros"))
    for wrapper in (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)):
        wrapper.modules_to_save["other"].bias.data += 7.0
    inputs = bert.inputs(2)
    mixed = logits(model.eval(), inputs, adapter_names=["other", "__base__"])
    base = logits(bert.base(), inputs)
    torch.testing.assert_close(mixed - base, torch.tensor([[7.0, 7.0], [0.0, 0.0]]), rtol=1e-5, atol=1e-5)


def test_training_unknown_names_and_merged_adapters_are_refused(llama: Case):
    model = llama.model()
    inputs = llama.inputs(2)
    with pytest.raises(ValueError, match="non-existing adapter.*: nobody"):
        model(**inputs, adapter_names=["default", "nobody"])
    for wrong in (1, 3, 4):
        with pytest.raises(ValueError, match=f"got {wrong} names for 2 rows"):
            model(**inputs, adapter_names=["default"] * wrong)
        with pytest.raises(ValueError, match=f"got {wrong} names for 2 rows"):
            model.generate(**inputs, adapter_names=["default"] * wrong, max_new_tokens=1)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(**inputs, adapter_names=["default"] * 2)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(**inputs, adapter_names=["default"] * 2)
    model.unmerge_adapter()
    model(**inputs, adapter_names=["default"] * 2)


def test_the_next_batch_is_not_routed(llama: Case):
    model = llama.model()
    inputs = llama.inputs(2)
    expected = logits(model, inputs)
    logits(model, inputs, adapter_names=["__base__"] * 2)
    assert torch.equal(logits(model, inputs), expected)


def test_cases_cover_an_encoder_decoder():
    assert CASES["t5"].base().config.is_encoder_decoder
