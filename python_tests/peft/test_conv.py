"""Convolutions with kernel 1 and modules that only prove linear, in a model: from injection to a loaded checkpoint."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loraxs_ext.layers import LoraXSConv, LoraXSOpaque
from loraxs_ext.peft import LoraXSConfig


class Packed(nn.Module):
    """A linear layer of a kind nobody has heard of."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.in_features = 16
        self.register_buffer("packed", torch.randn(12, 16, generator=torch.Generator().manual_seed(seed)).half())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.packed.to(x.dtype).mT


class Pixels(nn.Module):
    """Mixes channels of every pixel, then classifies the mean."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix = nn.Conv2d(8, 16, 1)
        self.pool = nn.Conv2d(16, 16, 3, padding=1)
        self.packed = Packed(seed)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.packed(self.pool(self.mix(x).relu()).mean((-1, -2))))


CONFIG = {"r": 4, "target_modules": ["mix", "packed"], "init_weights": False}


def make(**changes) -> PeftModel:
    return get_peft_model(Pixels(), LoraXSConfig(**{**CONFIG, **changes})).eval()


X = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(0))


def test_train_save_load(tmp_path):
    model = make()
    kinds = {type(module) for module in model.modules()}
    assert {LoraXSConv, LoraXSOpaque} <= kinds
    before = model(X)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(model(X), torch.arange(4) % 3).backward()
    optimizer.step()
    after = model(X)
    assert not torch.allclose(after, before)
    model.save_pretrained(tmp_path)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == 2 * (16 + 20)
    loaded = PeftModel.from_pretrained(Pixels(), tmp_path).eval()
    torch.testing.assert_close(loaded(X), after, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="another base model, revision or quantisation"):
        PeftModel.from_pretrained(Pixels(seed=1), tmp_path)


def test_mixed_batch_and_sum():
    model = make()
    model.add_adapter("second", LoraXSConfig(**{**CONFIG, "r": 6, "init_seed": 1}))
    model.base_model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "sum")
    names = ["second", "__base__", "default", "sum"]
    mixed = model(X, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            alone = Pixels().eval()(X)
        else:
            model.set_adapter(name)
            alone = model(X)
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-4)


def test_merge():
    model = make(target_modules=["mix", "head"])
    y = model(X)
    merged = model.merge_and_unload()
    assert type(merged.mix) is nn.Conv2d
    torch.testing.assert_close(merged(X), y, rtol=1e-4, atol=1e-4)
    opaque = make()
    with pytest.raises(TypeError, match="packed: base_layer: expected a weight to merge into, got Packed"):
        opaque.merge_and_unload()
    # Nothing was merged before the refusal.
    assert isinstance(opaque.base_model.model.mix, LoraXSConv) and not opaque.base_model.model.mix.merged
    assert type(make().unload().packed) is Packed


def test_other_convolutions_are_refused_by_name():
    with pytest.raises(TypeError, match=r"target_modules: pool: expected a convolution of kernel_size 1"):
        make(target_modules=["pool"])
