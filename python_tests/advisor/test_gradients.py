"""Energies of the advisor against dense gradients by autograd, at every rank."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraxs_ext import LoraXSConfig
from loraxs_ext.advisor import ModuleGradient, measure, model_loss
from loraxs_ext.advisor.gradients import Batch
from loraxs_ext.layers import LoraXSLayer

from ..peft.models import CASES, Case, layers_of

RANK_MAX = 6


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path))


def calibration(case: Case, count: int = 3) -> list[dict[str, Tensor]]:
    return [{**case.inputs(4, seed), "labels": case.labels(4)} for seed in range(count)]


def measured(model: nn.Module, case: Case, batches: Sequence[Batch], **options: Any) -> list[ModuleGradient]:
    config = LoraXSConfig(target_modules=list(case.targets), **options.pop("config", {}))
    return measure(model, batches, config, options.pop("rank_max", RANK_MAX), progress=False, **options)


def dense(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """∂L/∂W [N, K] of the summed loss, from autograd on W itself."""
    model = copy.deepcopy(model).requires_grad_(True)
    for batch in batches:
        model_loss(model, batch).backward()
    grads = {name: model.get_submodule(name).weight.grad for name in names}
    return {name: grad.mT if is_transposed(model, name) else grad for name, grad in grads.items()}


def is_transposed(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), Conv1D)


def weight(model: nn.Module, name: str) -> Tensor:
    module: Any = model.get_submodule(name)
    return module.weight.detach().mT if is_transposed(model, name) else module.weight.detach()


@pytest.mark.parametrize("name", CASES)
def test_energies_are_those_of_a_dense_gradient(name: str) -> None:
    case = CASES[name]
    model, batches = case.base(dtype=torch.float64), calibration(CASES[name])
    found = measured(model, case, batches, config={"svd": "exact"})
    adapted = [layer.key for layer in layers_of(get_peft_model(case.base(), case.config()))]
    assert [module.name for module in found] == adapted
    gradients = dense(model, adapted, batches)
    for module in found:
        G, W = gradients[module.name], weight(model, module.name)
        U, S, Vh = torch.linalg.svd(W)
        assert module.shape == tuple(W.shape) and module.rank_max == RANK_MAX
        assert module.energy == pytest.approx(float(G.square().sum()), rel=1e-9)
        captured, gained = module.captured(), module.gained()
        assert captured is not None and len(captured) == RANK_MAX and gained[0] == 0.0
        for r in range(1, RANK_MAX + 1):
            C = U[:, :r].mT @ G @ Vh[:r].mT
            assert captured[r - 1] == pytest.approx(float(C.square().sum() / G.square().sum()), rel=1e-6)
            assert gained[r] == pytest.approx(float((C * S[:r]).square().sum()), rel=1e-6)


def test_every_rank_alone_gives_the_same_as_the_leading_block() -> None:
    case = CASES["bert"]
    model, batches = case.base(dtype=torch.float64), calibration(case)
    nested = measured(model, case, batches, config={"svd": "exact"})
    for rank in range(1, RANK_MAX):
        alone = measured(model, case, batches, config={"svd": "exact"}, rank_max=rank)
        for one, large in zip(alone, nested, strict=True):
            assert one.gained() == pytest.approx(large.gained()[: rank + 1], rel=1e-9)


@pytest.mark.parametrize("sigma", ["A", "sqrt", "B"])
def test_unit_directions_do_not_depend_on_where_sigma_sits(sigma: str) -> None:
    case = CASES["llama"]
    model, batches = case.base(dtype=torch.float64), calibration(case)
    found = measured(model, case, batches, config={"sigma": sigma, "svd": "exact"})
    reference = measured(model, case, batches, config={"svd": "exact"})
    for one, other in zip(found, reference, strict=True):
        assert one.captured() == pytest.approx(other.captured(), rel=1e-9)


def test_energies_grow_with_the_rank_up_to_all_of_it() -> None:
    case = CASES["bert"]
    model = case.base(dtype=torch.float64)
    for module in measured(model, case, calibration(case), rank_max=1000):
        captured, gained = module.captured(), module.gained()
        assert captured is not None and module.rank_max == min(module.shape)
        assert all(a <= b for a, b in zip(captured, captured[1:], strict=False))
        assert all(a <= b for a, b in zip(gained, gained[1:], strict=False))
        if module.shape[0] == module.shape[1]:
            assert captured[-1] == pytest.approx(1.0, rel=1e-9)


def test_halves_are_every_other_batch() -> None:
    case = CASES["llama"]
    model, batches = case.base(dtype=torch.float64), calibration(case, 4)
    whole = measured(model, case, batches)
    for half in (0, 1):
        alone = measured(model, case, [batches[half], batches[half + 2]])
        for one, all_of_it in zip(alone, whole, strict=True):
            assert one.gained() == pytest.approx(all_of_it.gained(half), rel=1e-9)


def test_bounded_memory_takes_more_passes_and_gives_the_same() -> None:
    case = CASES["bert"]
    model, batches = case.base(), calibration(case)
    calls = 0

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return model_loss(model, batch)

    at_once = measured(model, case, batches, loss=counted)
    assert calls == len(batches)
    calls = 0
    one_by_one = measured(model, case, batches, loss=counted, gradient_memory=1)
    assert calls == len(batches) * len(at_once)
    calls = 0
    without = measured(model, case, batches, loss=counted, gradient_memory=0)
    assert calls == len(batches)
    for a, b, c in zip(at_once, one_by_one, without, strict=True):
        assert a.captured() == b.captured() and a.gained() == b.gained() == c.gained()
        assert c.energy is None and c.captured() is None


def test_the_model_is_left_as_it_was() -> None:
    case = CASES["bert"]
    model, batches = case.base(), calibration(case)
    model.train()
    model.bert.encoder.layer[0].eval()
    next(model.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    attributes = set(model.__dict__)
    measured(model, case, batches)

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        measured(model, case, batches, loss=broken)
    assert set(model.__dict__) == attributes
    assert not any(isinstance(module, LoraXSLayer) for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_same_bits_again_and_under_no_grad() -> None:
    case = CASES["llama"]
    first = measured(case.base(), case, calibration(case))
    with torch.no_grad():
        second = measured(case.base(), case, calibration(case))
    assert all(torch.equal(a.halves, b.halves) and a.energy == b.energy for a, b in zip(first, second, strict=True))


def test_a_direction_without_gain_is_not_captured() -> None:
    layer = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0])))
    model = nn.Sequential(layer)
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = LoraXSConfig(target_modules=["0"])
    (found,) = measure(
        model, [{"x": x}, {"x": -2 * x}], config, 4, loss=lambda m, b: m(b["x"]).exp().sum(), progress=False
    )
    captured = found.captured()
    # Two of the four columns of R move nothing, so that the whole gradient cannot be captured.
    assert captured is not None and 0 < captured[0] < captured[1] <= captured[2] <= captured[3] < 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 1}, "batches: expected at least 2"),
        ({"rank_max": 0}, "rank_max: expected at least 1"),
        ({"loss": lambda m, b: model_loss(m, b) * float("nan")}, "loss: expected a finite number"),
        ({"loss": lambda m, b: torch.zeros(())}, "loss: expected one that depends on the targeted modules"),
    ],
)
def test_what_cannot_be_measured_is_named(change: dict[str, Any], message: str) -> None:
    case = CASES["bert"]
    with pytest.raises(ValueError, match=message):
        measured(case.base(), case, calibration(case, change.pop("count", 3)), **change)


def test_a_model_with_adapters_is_refused() -> None:
    case = CASES["bert"]
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        measured(case.model(), case, calibration(case))


def test_an_input_changed_in_place_is_noticed() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            y = self.inner(x)
            x.zero_()
            return y.sum()

    batches = [{"x": torch.ones(2, 4)}] * 2
    with pytest.raises(RuntimeError, match="inner: input: expected to be unchanged"):
        config = LoraXSConfig(target_modules=["inner"])
        measure(Careless(), batches, config, 2, loss=lambda model, batch: model(**batch), progress=False)
