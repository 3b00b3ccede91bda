"""An independent implementation: PEFT's PSOFT without its constraints is LoRA-XS with R' = R − I."""

from __future__ import annotations

import pytest
import torch
from peft import PsoftConfig, get_peft_model

from .models import CASES, Case, layers_of, logits

# PSOFT does not know Conv1D.
LINEAR = {name: case for name, case in CASES.items() if name != "gpt2"}
SPLITS = {"psoft_init": "B", "pissa_init": "sqrt"}


@pytest.fixture(params=SPLITS.items(), ids=SPLITS.values())
def pair(request, linear: Case):
    """PSOFT and LoRA-XS models of the same rank and scaling, with R' = R − I, and their layers side by side."""
    init, sigma = request.param
    free = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False, "init_weights": False}
    names = {"r": 4, "psoft_alpha": 8, "target_modules": list(linear.targets), "ab_svd_init": init}
    theirs = get_peft_model(linear.base(), PsoftConfig(**names, **free)).eval()
    ours = linear.model(sigma=sigma, svd="exact", lora_alpha=8, task_type=None)
    modules = dict(theirs.named_modules())
    layers = {n: m for n, m in ours.named_modules() if m in layers_of(ours)}
    for name, layer in layers.items():
        layer.loraxs_R["default"].weight.data.copy_(modules[name].psoft_R["default"].weight - torch.eye(4))
    return theirs, ours, [(modules[name], layer) for name, layer in layers.items()]


@pytest.fixture(params=LINEAR.values(), ids=LINEAR)
def linear(request) -> Case:
    """Each architecture whose layers PSOFT can adapt."""
    return request.param


def test_same_update_on_the_same_basis(pair, linear: Case):
    theirs, ours, layers = pair
    for psoft, layer in layers:
        layer.set_basis(psoft._psoft_A_cache["default"], psoft._psoft_B_cache["default"].mT)
        expected = psoft.get_delta_weight("default")
        ulp = torch.finfo(torch.float32).eps * expected.abs().max().item()
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=0, atol=4 * ulp)
    torch.testing.assert_close(logits(ours, linear.inputs()), logits(theirs, linear.inputs()), rtol=1e-5, atol=1e-5)


def test_same_update_on_the_basis_each_computes(pair):
    """LAPACK's fp32 singular vectors are theirs; ours are accurate to more digits. PSOFT divides Σ by its scaling."""
    _, _, layers = pair
    for psoft, layer in layers:
        a, _ = layer.get_basis("default")
        signs = (psoft._psoft_A_cache["default"] * a).sum(1).sign()
        core = layer.loraxs_R["default"].weight
        core.data.copy_(signs[:, None] * core * signs)
        expected = psoft.get_delta_weight("default")
        delta = layer.get_delta_weight("default") / layer.scaling["default"]
        assert (delta - expected).norm() < 5e-5 * expected.norm()
