"""Whole models whose sibling layers share projections: the same outputs and gradients as with every layer alone."""

from __future__ import annotations

import pytest
import torch

from loraxs_ext import ops
from loraxs_ext.layers import linear as linear_module
from loraxs_ext.layers import stacked as stacked_module

from .models import layers_of, logits


@pytest.fixture
def projections(monkeypatch) -> list[int]:
    """Sharing on the CPU, for any number of tokens; the list grows by one with every shared projection."""
    seen: list[int] = []
    project = ops.project
    monkeypatch.setattr(ops, "project", lambda x, a: seen.append(a.shape[0]) or project(x, a))
    monkeypatch.setattr(linear_module, "SHARE_ON_CPU", True)
    monkeypatch.setattr(stacked_module, "ALONE_TOKENS", 0)
    return seen


def test_outputs_and_gradients(case, projections):
    # GPT-2 projects query, key and value in one layer: there is nothing to share.
    siblings = "c_attn" not in case.targets
    targets = {"target_modules": "all-linear"} if siblings else {}
    shared, alone = case.model(**targets), case.model(**targets)
    for layer in layers_of(alone):
        layer.siblings = None
    for _ in range(3):
        torch.testing.assert_close(logits(shared, case.inputs()), logits(alone, case.inputs()), rtol=1e-4, atol=1e-4)
    for model in (shared, alone):
        model.train()
        model(**case.inputs(), labels=case.labels()).loss.backward()
    gradients = [[p.grad for p in model.parameters() if p.grad is not None] for model in (shared, alone)]
    assert len(gradients[0]) == len(gradients[1]) > 0
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert bool(projections) == siblings


def test_four_sites_of_a_decoder_layer(llama, projections):
    model = llama.model(target_modules="all-linear")
    logits(model, llama.inputs())
    del projections[:]
    logits(model, llama.inputs(seed=1))
    # Query, key and value; gate and up; in each of two layers. The output and down projections stand alone.
    assert projections == [12, 8, 12, 8]


def test_mixed_batches(llama, projections):
    model = llama.model(target_modules="all-linear")
    model.add_adapter("other", llama.config(target_modules="all-linear", r=2, init_seed=1))
    rows = {name: logits(model, llama.inputs(), adapter_names=[name] * 4) for name in ("default", "other", "__base__")}
    names = ["other", "default", "__base__", "other"]
    mixed = logits(model, llama.inputs(), adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], rows[name][row], rtol=1e-4, atol=1e-4)
    assert projections


def test_generation_with_a_cache(llama, projections):
    model = llama.model(target_modules="all-linear")
    ids = llama.inputs()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(input_ids=ids, **options)
    assert projections
    for layer in layers_of(model):
        layer.siblings = None
    assert torch.equal(together, model.generate(input_ids=ids, **options))
