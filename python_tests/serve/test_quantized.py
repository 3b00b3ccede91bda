"""A pool over quantised layers, which are called as they are and get the low-rank part added."""

from __future__ import annotations

import pytest
import torch

import loraxs_ext
from loraxs_ext.serve import AdapterPool

from ..peft.models import layers_of, logits
from .sources import shelf_of

pytest.importorskip("bitsandbytes")

from ..peft.test_bitsandbytes import CASE, adapted, quantized  # noqa: E402


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_model(kind):
    oracle, model = adapted(kind), quantized(kind)
    inputs, shelf = CASE.inputs(2), shelf_of(oracle, ["default"])
    # Before the first forward pass, which repacks 4-bit weights on some CPUs and rounds their scales.
    with AdapterPool(model, shelf, slots=2):
        before = logits(model, inputs)
        with loraxs_ext.adapters(model, ["default", None]):
            found = logits(model, inputs)
        torch.testing.assert_close(logits(model, inputs), before)
    expected = logits(oracle, inputs, adapter_names=["default", "__base__"])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected[0], before[0], atol=0.1) and not layers_of(model)
