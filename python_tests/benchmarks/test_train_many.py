"""The benchmark of training many adapters: its row is whole, and a wrong gradient stops it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from benchmarks import train_many
from loraxs_ext import LoraXSConfig
from loraxs_ext.training.many import ManyAdapters


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path))


def test_a_row_holds_every_way_to_train(capsys):
    row = train_many.main(["--smoke", "--adapters", "5", "--tokens", "4", "--seconds", "0.1"])
    assert set(row["times"]) == {"one LoRA-XS", "5 adapters, one batch", "one PEFT LoRA", "5 adapters, 5 steps"}
    assert row["gradient_error"] <= train_many.TOLERANCE
    for name, times in row["times"].items():
        assert row["tokens_per_second"][name] == pytest.approx(20e6 / times["median_us"])
    assert row["many_over_one"] > 0 and "many over one" in capsys.readouterr().out


def test_a_gradient_that_depends_on_others_is_seen(monkeypatch):
    model = get_peft_model(train_many.small_decoder(), LoraXSConfig(**train_many.TARGETS))
    many = ManyAdapters(model, list("abcd"))
    ids = train_many.tokens(model, 4, 6)
    assert train_many.check(many, ids) <= train_many.TOLERANCE
    right = train_many.adapter_loss

    def wrong(logits, labels, slots, **options):
        return right(logits, labels, torch.zeros_like(slots), **options)

    monkeypatch.setattr(train_many, "adapter_loss", wrong)
    with pytest.raises(AssertionError, match="expected at most"):
        train_many.check(many, ids)
