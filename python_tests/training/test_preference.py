"""Preference tuning: taking the reference's logits from the same model leaves frozen what is frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft import LoraXSConfig

CHOSEN = torch.tensor([[2, 6, 12, 4, 3], [2, 7, 13, 4, 3]])
REJECTED = torch.tensor([[2, 9, 12, 5, 3], [2, 10, 13, 5, 3]])


def config() -> LoraXSConfig:
    return LoraXSConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)


@pytest.fixture
def base(llama: str):
    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture(params=[False, True], ids=["plain", "checkpointing"])
def model(base, request) -> PeftModel:
    policy = get_peft_model(base, config())
    if request.param:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def log_probability(model: torch.nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, ids[:, 1:, None]).sum((1, 2))


def dpo_step(model: PeftModel, optimizer: torch.optim.Optimizer, reference) -> None:
    """One step of direct preference optimisation; `reference` gives the log probabilities of the frozen side."""
    with torch.no_grad():
        frozen = reference(CHOSEN) - reference(REJECTED)
    margin = log_probability(model, CHOSEN) - log_probability(model, REJECTED) - frozen
    (-torch.nn.functional.logsigmoid(margin).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def flags(model: PeftModel) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def frozen_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Everything that must not move: weights, bases, sketches."""
    kept = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraXSLayer):
            assert layer.loraxs_A is not None and layer.loraxs_Bt is not None
            kept |= {f"{name}.A": layer.loraxs_A, f"{name}.Bt": layer.loraxs_Bt}
    return {name: tensor.detach().clone() for name, tensor in kept.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def adam(model: PeftModel) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)


def test_disabling_the_adapter_gives_the_base_and_changes_nothing(model, llama):
    expected = log_probability(AutoModelForCausalLM.from_pretrained(llama), CHOSEN)
    before, frozen = flags(model), frozen_tensors(model)
    trainable = {name for name, on in before.items() if on}
    assert trainable and all("loraxs_R" in name for name in trainable)
    optimizer = adam(model)

    def reference(ids: Tensor) -> Tensor:
        with model.disable_adapter():
            # Not even within: what unfreezes A and B here would train them.
            assert {name for name, on in flags(model).items() if on} <= trainable
            return log_probability(model, ids)

    for _ in range(3):
        state = copy.deepcopy(optimizer.state_dict())
        torch.testing.assert_close(reference(CHOSEN), expected, rtol=0, atol=0)
        assert str(optimizer.state_dict()) == str(state)
        dpo_step(model, optimizer, reference)
        assert flags(model) == before and same(frozen_tensors(model), frozen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(optimizer.state) == len(trained)
    margin = (log_probability(model, CHOSEN) - log_probability(model, REJECTED)).sum()
    assert margin > (reference(CHOSEN) - reference(REJECTED)).sum()


def test_a_frozen_reference_adapter_beside_the_policy(model):
    model.add_adapter("reference", config())
    model.load_state_dict(
        {n.replace(".default.", ".reference."): p for n, p in model.state_dict().items() if "loraxs_R.default" in n},
        strict=False,
    )
    model.set_adapter("default")
    before, frozen = flags(model), frozen_tensors(model)
    assert any("loraxs_R.reference" in name for name in frozen)
    with torch.no_grad():
        expected = log_probability(model, CHOSEN)
    optimizer = adam(model)

    def reference(ids: Tensor) -> Tensor:
        model.set_adapter("reference")
        try:
            return log_probability(model, ids)
        finally:
            model.set_adapter("default")

    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(reference(CHOSEN), expected)
        dpo_step(model, optimizer, reference)
        assert flags(model) == before and same(frozen_tensors(model), frozen)
    with torch.no_grad():
        assert not torch.equal(log_probability(model, CHOSEN), expected)


def test_disabling_between_forward_and_backward(model):
    """The reference may be asked while the policy's graph is still open."""
    chosen = log_probability(model, CHOSEN).sum()
    with torch.no_grad(), model.disable_adapter():
        log_probability(model, CHOSEN)
    chosen.backward()
    late = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    log_probability(model, CHOSEN).sum().backward()
    now = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(late, now, strict=True))
