"""A batch in which every row has another adapter: each row as if it were alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import loraxs_ext

from ..peft.models import logits
from .scenes import NAMES, Scene

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


def generate(model, ids, **options):
    return model.generate(input_ids=ids, **{"max_new_tokens": 5, "do_sample": False, **options})


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_each_row_gets_the_tokens_it_gets_alone(scene: Scene, options):
    ids = scene.ids()
    with loraxs_ext.adapters(scene.model, NAMES):
        mixed = generate(scene.model, ids, **options)
    returned = options.get("num_return_sequences", 1)
    outputs = set()
    for row, name in enumerate(NAMES):
        expected = generate(scene.alone(name), ids[row : row + 1], **options)
        assert torch.equal(mixed[row * returned : (row + 1) * returned], expected)
        outputs.add(tuple(expected[0].tolist()))
    assert len(outputs) > 1


def test_logits(scene: Scene):
    inputs = scene.case.inputs(len(NAMES))
    with loraxs_ext.adapters(scene.model, NAMES):
        mixed = logits(scene.model, inputs)
    for row, name in enumerate(NAMES):
        expected = logits(scene.alone(name), {key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=2e-5, atol=2e-5)


def test_neighbours_change_no_bit(scene: Scene):
    ids, found = scene.ids(), []
    for other in ("plain", "wide", None):
        with loraxs_ext.adapters(scene.model, [other, "wide", other, None]):
            steps = generate(scene.model, ids, return_dict_in_generate=True, output_logits=True).logits
        found.append(torch.stack(steps))
    for again in found[1:]:
        assert torch.equal(found[0][:, 1], again[:, 1]) and torch.equal(found[0][:, 3], again[:, 3])
        assert not torch.equal(found[0][:, 0], again[:, 0])


def test_sampling_depends_on_the_numbers_drawn_and_on_nothing_else(scene: Scene):
    ids, found = scene.ids(), []
    for names in (NAMES, *([name] * len(NAMES) for name in NAMES)):
        torch.manual_seed(5)
        with loraxs_ext.adapters(scene.model, names):
            found.append(generate(scene.model, ids, do_sample=True, temperature=2.0, max_new_tokens=8))
    mixed, *uniform = found
    for row, alone in enumerate(uniform):
        assert torch.equal(mixed[row], alone[row])
    assert not torch.equal(uniform[0], uniform[1])


def test_left_padding(llama: Scene):
    ids = llama.ids()
    mask = torch.ones_like(ids)
    for row, missing in enumerate([0, 3, 1, 2]):
        mask[row, :missing] = ids[row, :missing] = 0
    with loraxs_ext.adapters(llama.model, NAMES):
        mixed = generate(llama.model, ids, attention_mask=mask)
    for row, name in enumerate(NAMES):
        prompt = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        expected = generate(llama.alone(name), prompt)[0, prompt.shape[1] :]
        assert torch.equal(mixed[row, ids.shape[1] :], expected)


def test_one_row_with_assisted_decoding(llama: Scene):
    ids = llama.ids(1, 12)
    expected = generate(llama.alone("wide"), ids, max_new_tokens=8)
    for assistance in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": llama.base}):
        with loraxs_ext.adapters(llama.model, ["wide"]):
            assert torch.equal(generate(llama.model, ids, max_new_tokens=8, **assistance), expected)


def test_base_rows_are_those_of_a_batch_of_base_rows(scene: Scene):
    inputs = scene.case.inputs(len(NAMES))
    with loraxs_ext.adapters(scene.model, NAMES):
        mixed = logits(scene.model, inputs)
    with loraxs_ext.adapters(scene.model, [None] * len(NAMES)):
        assert torch.equal(logits(scene.model, inputs)[1], mixed[1])


def test_outside_of_the_context_it_is_the_base_model(scene: Scene):
    inputs = scene.case.inputs()
    expected = logits(scene.base, inputs)
    assert torch.equal(logits(scene.model, inputs), expected)
    with pytest.raises(ZeroDivisionError), loraxs_ext.adapters(scene.model, NAMES):
        1 / 0  # noqa: B018
    assert torch.equal(logits(scene.model, inputs), expected)
    assert "generate" not in vars(scene.model)
    assert scene.pool.stats()["in_use"] == 0


def test_nested_contexts(llama: Scene):
    inputs = llama.case.inputs(4)
    with loraxs_ext.adapters(llama.model, NAMES):
        outer = logits(llama.model, inputs)
        with loraxs_ext.adapters(llama.model, ["wide", None]):
            pair = {key: value[:2] for key, value in inputs.items()}
            inner = logits(llama.model, pair)
            assert generate(llama.model, pair["input_ids"]).shape[0] == 2
        assert torch.equal(logits(llama.model, inputs), outer)
        assert generate(llama.model, inputs["input_ids"]).shape[0] == 4
    torch.testing.assert_close(inner[:1], logits(llama.alone("wide"), {"input_ids": pair["input_ids"][:1]}))


@pytest.mark.parametrize("rows", [2, 8])
def test_other_numbers_of_rows_are_refused(scene: Scene, rows):
    inputs = scene.case.inputs(rows)
    with loraxs_ext.adapters(scene.model, NAMES):
        with pytest.raises(ValueError, match=f"one name per row of the batch, got 4 names for {rows} rows"):
            generate(scene.model, inputs["input_ids"])
        generate(scene.model, scene.ids())
        with pytest.raises(ValueError, match="got 4 for an input of shape"):
            logits(scene.model, inputs)


def test_what_is_not_a_list_of_names_is_refused(llama: Scene):
    for names, error in (("wide", TypeError), ([1], TypeError), ([], ValueError)):
        with pytest.raises(error, match="^names: expected"), loraxs_ext.adapters(llama.model, names):
            pass
    with pytest.raises(KeyError, match="nobody"), loraxs_ext.adapters(llama.model, ["wide", "nobody"]):
        pass
    assert llama.pool.stats()["in_use"] == 0
    with pytest.raises(ValueError, match="eval mode"), loraxs_ext.adapters(llama.model.train(), ["wide"]):
        pass


def test_a_plain_peft_model(scene: Scene):
    ids = scene.ids()
    assert isinstance(scene.oracle, PeftModel)
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        expected = generate(scene.oracle, ids, adapter_names=[name or "__base__" for name in NAMES], **options)
        for model in (scene.oracle, scene.oracle.get_base_model()):
            with loraxs_ext.adapters(model, NAMES):
                assert torch.equal(generate(model, ids, **options), expected)
    with loraxs_ext.adapters(scene.oracle, NAMES):
        with pytest.raises(ValueError, match="got 4 names for 8 rows"):
            generate(scene.oracle, scene.ids(8))
        with pytest.raises(ValueError, match="got 4 for an input of shape"):
            logits(scene.oracle, scene.case.inputs(8))


def test_an_adapter_that_is_served_is_not_deleted(llama: Scene):
    """Without a pool, its R is the model's own; in an outer context as in the innermost."""
    model, inputs = llama.oracle, llama.case.inputs(2)
    with loraxs_ext.adapters(model, ["wide", "plain"]):
        mixed = logits(model, inputs)
        with loraxs_ext.adapters(model, ["plain", None]):
            for name in ("wide", "plain"):
                with pytest.raises(RuntimeError, match=f"adapter_name: expected .* got '{name}'; leave the context"):
                    model.delete_adapter(name)
        model.delete_adapter("narrow")
        assert torch.equal(logits(model, inputs), mixed)
    model.delete_adapter("wide")
    assert set(model.peft_config) == {"default", "plain"}


def test_a_model_without_adapters_is_refused(llama: Scene):
    with pytest.raises(ValueError, match="expected one with an AdapterPool"), loraxs_ext.adapters(llama.base, NAMES):
        pass


def test_a_compiled_model_is_not_compiled_anew_for_other_adapters(llama: Scene):
    torch._dynamo.reset()
    inputs = llama.case.inputs(4)
    compiled = torch.compile(llama.model, fullgraph=True, backend="aot_eager")
    logits(compiled, inputs)
    with loraxs_ext.adapters(compiled, NAMES):
        logits(compiled, inputs)
    # Also not for leaving and entering, and not for adapters that displace others.
    llama.shelf.put("more", llama.shelf.row("wide"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(logits(compiled, inputs), logits(llama.model, inputs))
        for names in (["wide", "more", "narrow", None], [None] * 4):
            with loraxs_ext.adapters(compiled, names):
                eager = logits(llama.model, inputs)
                torch.testing.assert_close(logits(compiled, inputs), eager, rtol=1e-5, atol=1e-5)


def test_greedy_generation_compiled(llama: Scene):
    torch._dynamo.reset()
    ids = llama.ids()
    with loraxs_ext.adapters(llama.model, NAMES):
        expected = generate(llama.model, ids, cache_implementation="static")
    llama.model.forward = torch.compile(llama.model.forward, backend="eager")
    with loraxs_ext.adapters(llama.model, NAMES[::-1]):
        generate(llama.model, ids, cache_implementation="static")
    with torch._dynamo.config.patch(error_on_recompile=True), loraxs_ext.adapters(llama.model, NAMES):
        assert torch.equal(generate(llama.model, ids, cache_implementation="static"), expected)


def test_adapters_with_a_magnitude_are_mixed_in_a_peft_model(llama: Scene):
    case = llama.case
    model = case.model(use_edora=True)
    model.add_adapter("plain", case.config(r=6, init_seed=1))
    ids = llama.ids(3)
    with loraxs_ext.adapters(model.eval(), ["default", "plain", None]):
        mixed = generate(model, ids)
    for row, name in enumerate(["default", "plain"]):
        model.set_adapter(name)
        assert torch.equal(mixed[row : row + 1], generate(model, ids[row : row + 1]))
    assert torch.equal(mixed[2:], generate(llama.base, ids[2:]))
