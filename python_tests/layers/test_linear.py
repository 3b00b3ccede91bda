"""The layer against the dense fp64 model W + Σ s·B R A."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from loraxs_ext.layers import LoraXSLinear, routed

from .helpers import K, N, add, base_weight, dense_delta, expected_output, make_layer


class Opaque(nn.Linear):
    """A subclass may compute anything, so it is called as it is."""


BASES = {
    "linear": lambda: nn.Linear(K, N),
    "no bias": lambda: nn.Linear(K, N, bias=False),
    "subclass": lambda: Opaque(K, N),
    "conv1d": lambda: Conv1D(N, K),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lead", [(3, 5), (7,), (), (2, 0)], ids=str)
def test_output_is_that_of_the_dense_model(base, dtype, lead):
    layer = make_layer(base().to(dtype))
    x = torch.randn(*lead, K, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    close(y, expected_output(layer, x, "default"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_r_is_fp32_over_half_precision_bases(dtype):
    layer = make_layer(nn.Linear(K, N).to(dtype))
    assert layer.loraxs_R["default"].weight.dtype == torch.float32
    assert layer.loraxs_A.dtype == dtype


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_gradients_are_those_of_the_dense_model(base):
    layer = make_layer(base().double())
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    core = layer.loraxs_R["default"].weight
    layer(x).square().sum().backward()

    x2, core2 = x.detach().requires_grad_(), core.detach().clone().requires_grad_()
    r = layer.r["default"]
    delta = layer.scaling["default"] * layer.loraxs_Bt[:r].mT @ core2 @ layer.loraxs_A[:r]
    y = x2 @ (base_weight(layer) + delta).mT + (0 if layer.bias is None else layer.bias)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(core.grad, core2.grad)


def test_zero_r_is_the_base_layer():
    layer = make_layer(init_weights="zeros")
    x = torch.randn(4, K)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_hooks_and_trainable_weights_of_the_base_keep_working():
    layer = make_layer()
    seen = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(4, K)
    close(layer(x), expected_output(layer, x, "default"))
    assert seen
    layer = make_layer()
    layer.base_layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    close(layer.base_layer.weight.grad, x.sum(0).expand(N, K))
    assert layer.loraxs_R["default"].weight.grad.any()


def test_trainable_bias_gets_its_gradient():
    layer = make_layer()
    layer.base_layer.bias.requires_grad_(True)
    layer(torch.randn(4, K)).sum().backward()
    close(layer.base_layer.bias.grad, torch.full((N,), 4.0))


@pytest.mark.parametrize("r, alpha, rslora, expected", [(4, 8, False, 2.0), (4, 8, True, 4.0), (100, 50, False, 0.5)])
def test_scaling_uses_the_configured_rank(r, alpha, rslora, expected):
    layer = make_layer(r=r, lora_alpha=alpha, use_rslora=rslora)
    assert layer.scaling["default"] == expected
    assert layer.r["default"] == min(r, K, N)


def test_scale_methods_mean_what_they_mean_in_lora():
    layer = make_layer()
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 6.0
    layer.unscale_layer(2.0)
    assert layer.scaling["default"] == 3.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 2.0
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 1.0
    layer.set_scale("elsewhere", 0.5)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_several_active_adapters_add_up(base):
    layer = make_layer(base(), r=3)
    add(layer, "wide", 7)
    add(layer, "idle", 5)
    layer.set_adapter(["default", "wide"])
    x = torch.randn(6, K)
    close(layer(x), expected_output(layer, x, "default", "wide"))


def test_a_wider_adapter_leaves_the_basis_of_others_alone():
    layer = make_layer(r=3)
    before = [t.clone() for t in layer.get_basis("default")]
    add(layer, "wide", 9)
    assert all(torch.equal(old, new) for old, new in zip(before, layer.get_basis("default"), strict=True))


def test_basis_is_stored_for_the_fast_path_and_not_saved():
    layer = make_layer()
    a, b = layer.get_basis("default")
    assert (a.shape, b.shape) == ((4, K), (N, 4)) and b.mT.is_contiguous() and a.is_contiguous()
    assert set(layer.state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        "loraxs_R.default.weight",
        "loraxs_R.default.sketch",
    }


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_dropout_is_unbiased_off_in_eval_and_repeats_with_the_generator(base):
    layer = make_layer(base(), dropout=0.25)
    x = torch.randn(1, K)
    exact = expected_output(layer, x, "default")
    layer.train()
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    mean = layer(x.expand(40_000, K)).double().mean(0)
    spread = layer(x.expand(40_000, K)).double().std(0) / 200
    assert ((mean - exact[0]).abs() < 5 * spread).all()
    layer.eval()
    close(layer(x), exact)


def test_adapters_with_different_dropout_are_dropped_separately():
    layer = make_layer(dropout=0.5)
    add(layer, "dry", 4)
    layer.set_adapter(["default", "dry"])
    layer.train()
    layer.loraxs_R["default"].weight.data.zero_()
    x = torch.randn(6, K)
    close(layer(x), expected_output(layer, x, "dry"))


def test_checkpointing_repeats_the_mask():
    layer = make_layer(nn.Linear(K, N).double(), dropout=0.5).train()
    x = torch.randn(6, K, dtype=torch.float64, requires_grad=True)
    core = layer.loraxs_R["default"].weight
    grads = []
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(run().square().sum(), [x, core]))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_autocast_gives_the_base_layers_dtype(base):
    layer = make_layer(base())
    x = torch.randn(6, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype == torch.bfloat16
    close(y, expected_output(layer, x, "default"), torch.bfloat16)
    y.float().sum().backward()
    assert layer.loraxs_R["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["dry", "dropout"])
def test_compiles_without_graph_breaks(base, dropout):
    torch._dynamo.reset()
    layer = make_layer(base(), dropout=dropout).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, K)
    compiled(x).sum().backward()
    assert layer.loraxs_R["default"].weight.grad.any()
    layer.eval()
    close(compiled(x), expected_output(layer, x, "default"))


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merged_is_unmerged_and_comes_back_bit_by_bit(base, dtype):
    layer = make_layer(base().to(dtype), r=3)
    add(layer, "other", 5)
    x = torch.randn(6, K, dtype=dtype)
    original = layer.base_layer.weight
    bits = original.clone()
    expected = expected_output(layer, x, "default", "other")
    layer.merge(safe_merge=True)
    close(layer(x), x.double() @ (base_weight(layer) + dense_delta(layer, "default")).mT + _bias(layer), dtype)
    with pytest.warns(UserWarning, match="additionally merging"):
        layer.merge(adapter_names=["default", "other"])
    assert layer.merged_adapters == ["default", "other"]
    close(layer(x), expected, dtype)
    assert not [n for n, _ in layer.named_parameters() if "unmerged" in n]
    layer.unmerge()
    assert layer.base_layer.weight is original and torch.equal(original, bits)


def _bias(layer: LoraXSLinear) -> torch.Tensor:
    return torch.zeros(N) if layer.bias is None else layer.bias.double()


class Doubled(LoraXSLinear):
    """A relative of LoRA-XS with another R and another basis."""

    def get_R(self, adapter: str) -> torch.Tensor:
        """2 R."""
        return 2 * super().get_R(adapter)

    def get_basis(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """3 A and B."""
        a, b = super().get_basis(adapter)
        return 3 * a, b


def test_r_and_basis_may_be_overridden():
    layer = make_layer()
    x = torch.randn(4, K)
    base = layer.base_layer(x)
    expected = base + 6 * (layer(x) - base)
    layer.__class__ = Doubled
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    with routed([layer], ["default"] * 4):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_merging_leaves_a_shared_weight_alone():
    first, second = make_layer(), make_layer()
    second.base_layer.weight = first.base_layer.weight
    bits = first.base_layer.weight.clone()
    first.merge()
    second.merge()
    second.unmerge()
    first.unmerge()
    assert torch.equal(first.base_layer.weight, bits) and first.base_layer.weight is second.base_layer.weight


def test_safe_merge_refuses_a_broken_adapter():
    layer = make_layer()
    layer.loraxs_R["default"].weight.data[0, 0] = torch.nan
    bits = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, bits) and not layer.merged


def test_a_merge_that_loses_the_delta_says_how_much():
    layer = make_layer(nn.Linear(K, N).bfloat16())
    layer.loraxs_R["default"].weight.data.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"model.default: rounding .* by \d+\.\d%"):
        layer.merge()


@pytest.mark.parametrize("method", ["merge", "unmerge"])
def test_merging_or_unmerging_twice_warns(method):
    layer = make_layer()
    if method == "merge":
        layer.merge()
    with pytest.warns(UserWarning, match="nothing to do|Nothing to do"):
        getattr(layer, method)()


def test_disabled_layer_is_the_base_layer_even_if_merged():
    layer = make_layer()
    x = torch.randn(4, K)
    base = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    close(layer(x), expected_output(layer, x, "default"))


def test_wrong_basis_shape_is_refused():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"expected a \[r, 24\] and bt \[r, 20\], got \[2, 20\] and \[2, 24\]"):
        layer.set_basis(torch.zeros(2, N), torch.zeros(2, K))


def test_a_base_on_the_meta_device_is_named():
    layer = LoraXSLinear(nn.Linear(K, N, device="meta"), "model.q", "default", {}, r=2, lora_alpha=2, policy=_Idle())
    with pytest.raises(RuntimeError, match="model.q: base_layer: expected weights"):
        layer(torch.randn(1, K))


class _Idle:
    def settle(self, layer) -> None:
        pass
