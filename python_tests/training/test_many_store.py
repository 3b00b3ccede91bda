"""Adapters that were trained together go to a store, and come back."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import loraxs_ext
from loraxs_ext.store import AdapterStore
from loraxs_ext.training.many.catalogue import load_from_store, manifest_of, save_to_store
from loraxs_ext.training.many.files import set_row

from .test_many import NAMES, batch, many_adapters

pytest.importorskip("lmdb")


@pytest.fixture
def many(llama):
    many = many_adapters(llama).eval()
    many.rows.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return many


def test_a_store_in_one_call_and_back(llama, many, tmp_path):
    assert save_to_store(many, tmp_path / "store") == [1] * 5
    assert save_to_store(many, tmp_path / "store", ["bob"]) == [2]
    other = many_adapters(llama)
    with AdapterStore(tmp_path / "store", readonly=True) as store:
        assert sorted(store) == sorted(NAMES) and store.manifest.digest == manifest_of(other).digest
        load_from_store(other, store)
        assert torch.equal(other.rows, many.rows)
        with pytest.raises(KeyError, match="nobody"):
            load_from_store(many_adapters(llama, ["nobody"]), store)
        with pytest.raises(ValueError, match="adapter 'ann': expected RowLayout"):
            load_from_store(many_adapters(llama, ["ann"], lora_alpha=16), store)


def test_they_are_served_from_there(llama, many, tmp_path):
    save_to_store(many, tmp_path / "store")
    ids, _ = batch(0)
    names = [*NAMES, None]
    with torch.no_grad():
        expected = many(many.slots(names), input_ids=ids).logits
        model = LlamaForCausalLM.from_pretrained(llama).eval()
        with AdapterStore(tmp_path / "store", readonly=True) as store:
            loraxs_ext.AdapterPool(model, store, slots=8)
            with loraxs_ext.adapters(model, names):
                served = model(input_ids=ids).logits
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)


def test_the_rows_in_training_can_be_served_too(llama, many):
    """As a RowSource: a changed row is a new version."""
    ids, _ = batch(0)
    names = [*NAMES, None]
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    loraxs_ext.AdapterPool(model, many, slots=8, adapter_config=many.template_config)
    for _ in range(2):
        with torch.no_grad(), loraxs_ext.adapters(model, names):
            served = model(input_ids=ids).logits
        torch.testing.assert_close(served, many(many.slots(names), input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        set_row(many, "ann", torch.zeros(many.layout.size))


def test_stores_of_another_basis_are_refused(llama, many, tmp_path):
    save_to_store(many, tmp_path / "store")
    before = many.rows.detach().clone()
    with AdapterStore(tmp_path / "store") as store:
        for other, message in (
            (many_adapters(llama, sigma="B"), "expected the recipe"),
            (many_adapters(llama, r=6), "expected a basis of rank 6, got rank 4"),
        ):
            for call in (save_to_store, load_from_store):
                with pytest.raises(ValueError, match=message):
                    call(other, store)
        stranger = many_adapters(llama)
        stranger.layers[0].base_fingerprint = "0" * 16
        with pytest.raises(ValueError, match="expected adapters of the base"):
            save_to_store(stranger, store)
        assert [store.version(name) for name in NAMES] == [1] * 5
    assert torch.equal(many.rows, before)
