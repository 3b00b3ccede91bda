"""Adapters that were trained together are ordinary adapters: in PEFT's folders, in rows, in one file."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from loraxs_ext.training.many import ManyAdapters
from loraxs_ext.training.many.files import load_all, load_folder, save_all, save_folders, set_row

from .test_many import NAMES, batch, many_adapters, peft_model


@pytest.fixture
def many(llama) -> ManyAdapters:
    many = many_adapters(llama)
    many.rows.data.normal_(generator=torch.Generator().manual_seed(0))
    return many.eval()


def test_a_folder_is_what_peft_writes_for_the_adapter_alone(llama, many, tmp_path):
    paths = save_folders(many, tmp_path / "all")
    assert [path.name for path in paths] == list(NAMES)
    for slot, path in enumerate(paths):
        alone = peft_model(llama)
        cores = many.rows[slot].detach().split([s.r**2 for s in many.layout.segments])
        for (_, parameter), core in zip(
            [(n, p) for n, p in alone.named_parameters() if p.requires_grad], cores, strict=True
        ):
            parameter.data.copy_(core.view_as(parameter))
        alone.save_pretrained(tmp_path / "alone")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (path / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_a_reloaded_adapter_computes_the_same(llama, many, tmp_path):
    (path,) = save_folders(many, tmp_path, ["cat"])
    assert [p.name for p in tmp_path.iterdir()] == ["cat"]
    ids, _ = batch(0)
    alone = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), str(path)).eval()
    with torch.no_grad():
        together = many(many.slots(["cat", "ann"] * 3), input_ids=ids).logits
        torch.testing.assert_close(together[::2], alone(input_ids=ids).logits[::2], rtol=1e-5, atol=1e-5)


def test_folders_come_back_bit_for_bit_and_leave_the_template(llama, many, tmp_path):
    template = [layer.get_R("default").detach().clone() for layer in many.layers]
    save_folders(many, tmp_path)
    other = many_adapters(llama)
    for name in NAMES:
        load_folder(other, name, tmp_path / name)
    assert torch.equal(other.rows, many.rows)
    for model in (many, other):
        assert all(torch.equal(m.get_R("default"), was) for m, was in zip(model.layers, template, strict=True))
        assert all(layer.is_settled("default") for layer in model.layers)


def test_a_folder_of_an_adapter_is_replaced_and_nothing_else(many, tmp_path):
    for _ in range(2):
        (path,) = save_folders(many, tmp_path, ["cat"])
        assert sorted(p.name for p in path.iterdir())[:2] == ["README.md", "adapter_config.json"]
        (path / "of the old one").touch()
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "letter").touch()
    with pytest.raises(FileExistsError, match="ann is not the folder of a model or an adapter"):
        save_folders(many, tmp_path, ["ann"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ann", "cat"] and (tmp_path / "ann" / "letter").exists()


def test_seeds_are_written_down(llama, tmp_path):
    many = ManyAdapters(peft_model(llama, init_seed=3), ["x", "y"], seeds=[8, 9])
    seeds = [json.loads((p / "adapter_config.json").read_text())["init_seed"] for p in save_folders(many, tmp_path)]
    assert seeds == [8, 9] and many.template_config.init_seed == 3


def test_adapters_that_differ_are_refused(llama, many, tmp_path):
    before = many.rows.detach().clone()
    many_adapters(llama, ["ann"], r=3).model.save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"adapter\.r: expected 3, as in ann"):
        load_folder(many, "ann", tmp_path / "narrow")
    peft_model(llama, target_modules=["q_proj"]).save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match="ann: expected the same target modules"):
        load_folder(many, "ann", tmp_path / "few")
    with pytest.raises(FileNotFoundError, match="ann: expected a folder with"):
        load_folder(many, "ann", tmp_path / "nowhere")
    base = LlamaForCausalLM.from_pretrained(llama)
    base.model.layers[0].self_attn.q_proj.weight.data.normal_()
    stranger = many_adapters(llama).model
    stranger.base_model.model.load_state_dict(base.state_dict(), strict=False)
    from peft import get_peft_model

    get_peft_model(base, many.template_config).save_pretrained(tmp_path / "stranger")
    with pytest.raises(ValueError, match="basis|base"):
        load_folder(many, "ann", tmp_path / "stranger")
    with pytest.raises(ValueError, match=r"numbers: expected \[\d+\], got \[3\]"):
        set_row(many, "ann", torch.zeros(3))
    with pytest.raises(ValueError, match=r"got '\.\./ann'"):
        save_folders(ManyAdapters(peft_model(llama), ["../ann"]), tmp_path)
    assert torch.equal(many.rows, before)
    assert all(layer.is_settled("default") for layer in many.layers)


def test_rows_are_what_a_store_takes(many):
    row = many.row("bob")
    assert row.name == "bob" and row.layout == many.layout and row.steps is None
    assert torch.equal(row.numbers, many.rows[1]) and row.numbers.data_ptr() == many.rows[1].data_ptr()
    assert {s.key for s in many.layout.segments} == {layer.key for layer in many.layers}
    assert all(s.scaling == 2.0 and s.r == 4 for s in many.layout.segments)
    before = many.version("bob")
    set_row(many, "bob", torch.zeros(many.layout.size))
    assert many.version("bob") > before
    with pytest.raises(KeyError):
        many.row("nobody")


def test_all_of_them_in_one_file(llama, many, tmp_path):
    save_all(many, tmp_path / "all.safetensors")
    assert load_file(tmp_path / "all.safetensors")["rows"].equal(many.rows)
    other = many_adapters(llama)
    load_all(other, tmp_path / "all.safetensors")
    assert torch.equal(other.rows, many.rows)
    for names, options in ((("ann", "bob"), {}), (NAMES, {"r": 3}), (NAMES[::-1], {})):
        with pytest.raises(ValueError, match=r"all\.safetensors: its (names|layout) is"):
            load_all(many_adapters(llama, names, **options), tmp_path / "all.safetensors")
    data = bytearray((tmp_path / "all.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "all.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        load_all(other, tmp_path / "all.safetensors")
    assert torch.equal(other.rows, many.rows)
