"""An independent implementation: PEFT's PSOFT without its constraints is LoRA-XS with R' = R − I."""

from __future__ import annotations

import pytest
import torch
from peft import PsoftConfig, get_peft_model

from .models import Case, layers_of, logits


def psoft(case: Case, init: str, r: int = 4, alpha: int = 8):
    free = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False}
    config = PsoftConfig(
        r=r,
        psoft_alpha=alpha,
        target_modules=list(case.targets),
        task_type=case.task,
        ab_svd_init=init,
        init_weights=False,
        fan_in_fan_out="c_attn" in case.targets,
        **free,
    )
    torch.manual_seed(1)
    return get_peft_model(case.base(), config).eval()


@pytest.mark.parametrize("init, sigma", [("psoft_init", "B"), ("pissa_init", "sqrt")])
def test_same_function(case: Case, init, sigma):
    theirs = psoft(case, init)
    # PSOFT divides Σ by its scaling, so its update is B (R − I) A without one: alpha = r here.
    ours = case.model(sigma=sigma, svd="exact", lora_alpha=4)
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for name, layer in ours.named_modules():
            if layer not in layers_of(ours):
                continue
            module = modules[name]
            r = module.get_submodule("psoft_R.default").weight - torch.eye(4)
            a, b = layer.get_basis("default")
            signs = (module._psoft_A_cache["default"] * a).sum(1).sign()
            core = signs[:, None] * r * signs
            layer.loraxs_R["default"].weight.copy_(core)
            theirs_delta = module.get_delta_weight("default")
            scale = theirs_delta.abs().max()
            torch.testing.assert_close(
                layer.get_delta_weight("default"), theirs_delta, rtol=0, atol=4e-6 * scale.item()
            )
    head = {n: p for n, p in theirs.named_parameters() if "modules_to_save" in n}
    ours.load_state_dict(head, strict=False)
    torch.testing.assert_close(logits(ours, case.inputs()), logits(theirs, case.inputs()), rtol=2e-5, atol=2e-5)
