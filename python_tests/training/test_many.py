"""Adapters trained together are adapters trained alone."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from loraxs_ext import LoraXSConfig
from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.training.many import ManyAdapters, SlotAdamW, adapter_loss
from loraxs_ext.training.many.loss import adapter_items

from .tiny import WORDS

NAMES = ("ann", "bob", "cat", "dan", "eve")
# Who has which row in which step; some are absent from some steps, and one row is nobody's.
STEPS = (
    ("ann", "bob", "ann", "cat", "eve", None),
    ("bob", "bob", "cat", "cat", "eve", "eve"),
    ("dan", "ann", "dan", "ann", "bob", "cat"),
    ("eve", None, "dan", "dan", "dan", "ann"),
)
LR = 2e-2


def config(**options) -> LoraXSConfig:
    return LoraXSConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )


def peft_model(folder: str, **options):
    return get_peft_model(LlamaForCausalLM.from_pretrained(folder), config(**options))


def many_adapters(folder: str, names=NAMES, **options) -> ManyAdapters:
    return ManyAdapters(peft_model(folder, **options), names).train()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens [6, 10] and labels with padding and prompts that do not count."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(len(WORDS), (6, 10), generator=draw)
    labels = ids.clone()
    for row, (begin, end) in enumerate(torch.randint(1, 4, (6, 2), generator=draw).tolist()):
        labels[row, :begin] = labels[row, 10 - end :] = -100
    return ids, labels


def run_step(many: ManyAdapters, names, step: int, accumulate: int = 1, autocast: bool = False) -> None:
    """Forward and backward of one step, in `accumulate` parts."""
    torch.manual_seed(step)
    ids, labels = batch(step)
    slots = many.slots(names)
    items = adapter_items(labels, slots, len(many.names), shift=True)
    for part in zip(ids.chunk(accumulate), labels.chunk(accumulate), slots.chunk(accumulate), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = many(part[2], input_ids=part[0]).logits
        loss = adapter_loss(logits, part[1], part[2], shift=True, items=items)
        if (part[2] >= 0).any():
            loss.total.backward()


CASES = {
    "fp32": {},
    "dropout": {"loraxs_dropout": 0.2},
    "accumulated": {"accumulate": 3},
    "autocast": {"autocast": True},
    "checkpointed": {"checkpointing": True, "loraxs_dropout": 0.2},
}


@pytest.mark.parametrize("case", CASES)
def test_together_is_alone_bit_for_bit(llama, case):
    """Alone, an adapter meets the same batches; the rows of the others are served by the plain model and not learnt."""
    options = dict(CASES[case])
    passes = {key: options.pop(key) for key in ("accumulate", "autocast") if key in options}
    checkpointing = options.pop("checkpointing", False)
    together = many_adapters(llama, **options)
    alone = {name: many_adapters(llama, [name], **options) for name in NAMES}
    begun = together.rows.detach().clone()
    if checkpointing:
        # Only together, so that what is recomputed is compared with what is kept.
        together.activation_checkpointing_enable()
    optimizer = SlotAdamW([together.rows], lr=LR)
    plain = {name: torch.optim.AdamW([model.rows], lr=LR) for name, model in alone.items()}
    for step, names in enumerate(STEPS):
        run_step(together, names, step, **passes)
        assert together.rows.grad is not None and together.rows.grad.is_sparse
        optimizer.step()
        optimizer.zero_grad()
        for name in {*names} - {None}:
            model = alone[name]
            run_step(model, [name if n == name else None for n in names], step, **passes)
            model.rows.grad = model.rows.grad.to_dense()
            plain[name].step()
            plain[name].zero_grad()
        for slot, name in enumerate(NAMES):
            assert torch.equal(together.rows[slot], alone[name].rows[0]), (step, name)
    assert optimizer.own_steps(together.rows).tolist() == [3, 3, 3, 2, 3]
    assert ((together.rows - begun).abs().amax(dim=1) > LR).all()


def test_together_is_plain_peft_with_ones_own_rows_to_rounding(llama):
    """Stock PEFT, the model's own loss, torch's AdamW, and batches of one's own rows only."""
    together = many_adapters(llama)
    optimizer = SlotAdamW([together.rows], lr=LR)
    models = {name: peft_model(llama).train() for name in NAMES}
    plain = {n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=LR) for n, m in models.items()}
    for step, names in enumerate(STEPS):
        run_step(together, names, step)
        optimizer.step()
        optimizer.zero_grad()
        ids, labels = batch(step)
        for name in {*names} - {None}:
            own = [row for row, n in enumerate(names) if n == name]
            models[name](input_ids=ids[own], labels=labels[own]).loss.backward()
            plain[name].step()
            plain[name].zero_grad()
    for slot, name in enumerate(NAMES):
        layers = [m for m in models[name].modules() if isinstance(m, LoraXSLayer)]
        row = torch.cat([layer.get_R("default").detach().flatten() for layer in layers])
        # Adam divides by the gradient's length: rounding of a small gradient shows in full.
        torch.testing.assert_close(together.rows[slot].detach(), row, rtol=0, atol=1e-4 * LR * len(STEPS))


def test_an_adapter_starts_as_it_would_alone(llama):
    many = ManyAdapters(peft_model(llama, init_seed=3), NAMES, seeds=[3, 5, 3, 0, 1])
    for slot, seed in enumerate(many.seeds):
        layers = [m for m in peft_model(llama, init_seed=seed).modules() if isinstance(m, LoraXSLayer)]
        row = torch.cat([layer.get_R("default").detach().flatten() for layer in layers])
        assert torch.equal(many.rows[slot], row) and row.any()
    assert not torch.equal(many.rows[0], many.rows[1])
    assert torch.equal(ManyAdapters(peft_model(llama), ["a", "b"]).rows[0], many.rows[3])


def test_only_the_rows_are_trained_and_only_those_of_the_batch(llama):
    many = many_adapters(llama, [f"user{i}" for i in range(1000)])
    assert [name for name, p in many.named_parameters() if p.requires_grad] == ["rows"]
    ids, labels = batch(0)
    slots = torch.tensor([7, 999, -1, 7, 500, 7], dtype=torch.int32)
    adapter_loss(many(slots, input_ids=ids).logits, labels, slots, shift=True).total.backward()
    assert many.rows.grad._indices().tolist() == [[7, 500, 999]]
    assert many.rows.grad._values().shape == (3, many.layout.size)


def test_rows_of_nobody_are_the_plain_model(llama):
    many = many_adapters(llama, init_weights=False).eval()
    ids, _ = batch(0)
    with torch.no_grad():
        nobody = many(many.slots([None] * 6), input_ids=ids).logits
        mixed = many(many.slots([None, "ann"] * 3), input_ids=ids).logits
    torch.testing.assert_close(nobody, LlamaForCausalLM.from_pretrained(llama).eval()(input_ids=ids).logits)
    torch.testing.assert_close(mixed[::2], nobody[::2])
    assert not torch.allclose(mixed[1::2], nobody[1::2])


def test_a_text_is_generated_by_its_adapter(llama):
    many = many_adapters(llama, init_weights=False).eval()
    many.rows.data *= torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    ids, _ = batch(0)
    options = {"min_new_tokens": 5, "max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    with many.routed(many.slots([*NAMES, None])):
        mixed = many.model.generate(input_ids=ids, **options)
    texts = set()
    for row, name in enumerate([*NAMES, None]):
        with many.routed(many.slots([name])):
            alone = many.model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(mixed[row : row + 1], alone)
        texts.add(tuple(alone[0, 10:].tolist()))
    assert len(texts) > 1


def test_gradients_outside_the_route_are_refused(llama):
    many = many_adapters(llama)
    ids, labels = batch(0)
    slots = many.slots([*NAMES, None])
    with pytest.raises(ValueError, match="labels: expected None"):
        many(slots, input_ids=ids, labels=labels)
    for wrong in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, -2]):
        with pytest.raises(ValueError, match=rf"slots: expected values in \[-1, 5\), got {wrong[-1]}"):
            many(torch.tensor(wrong), input_ids=ids)
    with pytest.raises(ValueError, match="slots: expected integers"):
        many(torch.zeros(6), input_ids=ids)
    # Three would divide six.
    with pytest.raises(ValueError, match="slots: expected one per row of input_ids, 6, got 3"):
        many(torch.tensor([0, 1, 2]), input_ids=ids)
    with pytest.raises(ValueError, match="got 'nobody'"):
        many.slots(["ann", "nobody"])
    with pytest.raises(ValueError, match="use_reentrant=False, got True"):
        many.activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_edora": True}, "use_edora: expected False.*not the magnitudes of EDoRA"),
        ({"use_tinylora": True}, "use_tinylora.*not TinyLoRA's vectors"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save: expected None.*not heads"),
        ({"bias": "loraxs_only"}, "bias: expected 'none'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_templates_that_train_more_than_R_are_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        ManyAdapters(peft_model(llama, **options), NAMES)


def test_models_that_do_not_fit_are_refused(llama):
    model = peft_model(llama)
    for names, message in ((["a", "a"], "different names"), ([], "at least one")):
        with pytest.raises(ValueError, match=message):
            ManyAdapters(model, names)
    with pytest.raises(ValueError, match="seeds: expected one for each of 2 adapters, got 1"):
        ManyAdapters(model, ["a", "b"], seeds=[1])
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="no gradient checkpointing yet"):
        ManyAdapters(model, NAMES)
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match=r"expected one adapter named 'default', got \['default', 'other'\]"):
        ManyAdapters(model, NAMES)
