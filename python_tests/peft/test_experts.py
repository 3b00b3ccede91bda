"""Parameters that no layer of their own holds: stacked experts in both layouts, and a router's matrix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from loraxs_ext.layers import ParamWrapper
from loraxs_ext.peft import LoraXSConfig

from .models import Case, logits, train

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def _mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES))


def _gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, layer_types=["full_attention"] * 2))


@dataclasses.dataclass(frozen=True)
class ExpertCase(Case):
    """A mixture of experts whose experts matter."""

    def base(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = super().base(seed).float()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 3:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model.to(dtype)

    def config(self, **changes) -> LoraXSConfig:
        return super().config(**{"target_parameters": PARAMETERS, **changes})


MOE = {
    "mixtral": ExpertCase(_mixtral, ("q_proj",), "CAUSAL_LM"),
    "gpt_oss": ExpertCase(_gpt_oss, ("q_proj",), "CAUSAL_LM"),
}


@pytest.fixture(params=MOE)
def case(request) -> ExpertCase:
    """Experts stored as [E, N, K], and as [E, K, N]."""
    return MOE[request.param]


def wrappers(model: nn.Module) -> list[ParamWrapper]:
    """The wrapped parameters."""
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def delta(layer: ParamWrapper, adapter: str) -> Tensor:
    """s·B R A in the layout of the parameter, expert by expert, from its definition."""
    r, core = layer.r[adapter], layer.loraxs_R[adapter].weight
    parts = [
        layer.scaling[adapter] * layer.loraxs_Bt[e, :r].double().mT @ core[e].double() @ layer.loraxs_A[e, :r].double()
        for e in range(layer.num_experts)
    ]
    stacked = torch.stack([part.mT if layer.is_transposed else part for part in parts])
    return stacked.to(layer.stored_weight().dtype)


def dense(case: ExpertCase, model: nn.Module, *adapters: str) -> nn.Module:
    """The base model with the adapters added to its parameters."""
    base = case.base()
    for layer in wrappers(model):
        path, _, name = layer.key.rpartition(".")
        parameter = getattr(base.get_submodule(path), name)
        parameter.data += sum(delta(layer, adapter).detach() for adapter in adapters)
    return base


def test_output_is_that_of_the_adapted_weights(case):
    model = case.model(target_modules=[])
    assert len(wrappers(model)) == 4
    found = logits(model, case.inputs())
    torch.testing.assert_close(found, logits(dense(case, model, "default"), case.inputs()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(case.base(), case.inputs()), atol=0.1)


def test_bases_are_those_of_each_expert(case):
    layer = wrappers(case.model(target_modules=[]))[0]
    assert layer.is_transposed is (case is MOE["gpt_oss"])
    stored = layer.stored_weight()
    for expert in range(3):
        w = stored[expert].mT if layer.is_transposed else stored[expert]
        values = torch.linalg.svdvals(w)[:4]
        torch.testing.assert_close(layer.loraxs_A[expert].norm(dim=1), values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.loraxs_Bt[expert] @ w, layer.loraxs_A[expert], rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_core_and_nothing_else(case):
    model = case.model(target_modules=[])
    model.train()
    model(**case.inputs(), labels=case.labels()).loss.backward()
    base = dense(case, model, "default").train()
    base(**case.inputs(), labels=case.labels()).loss.backward()
    for layer in wrappers(model):
        path, _, name = layer.key.rpartition(".")
        gradient = getattr(base.get_submodule(path), name).grad.double()
        gradient = gradient.mT if layer.is_transposed else gradient
        expected = layer.scaling["default"] * layer.loraxs_Bt.double() @ gradient @ layer.loraxs_A.double().mT
        found = layer.loraxs_R["default"].weight.grad.double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 4 and all("loraxs_R" in name for name in trained)


def test_one_tensor_of_the_size_of_the_experts_is_made(case):
    class Count(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if isinstance(out, Tensor) and out.numel() >= size and out.untyped_storage().data_ptr() not in inputs:
                self.made += 1
            return out

    layer = wrappers(case.model(target_modules=[]))[0]
    size = layer.stored_weight().numel()
    with Count() as count, torch.no_grad():
        layer._adapted(["default"])
    assert count.made == 1


def test_merge_unmerge_disable_unload(case):
    model, base = case.model(), case.base()
    plain, adapted = logits(base, case.inputs()), logits(model, case.inputs())
    with model.disable_adapter():
        assert torch.equal(logits(model, case.inputs()), plain)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, case.inputs()), adapted, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model, case.inputs()), plain)
    assert torch.equal(logits(model, case.inputs()), adapted)
    merged = case.model().merge_and_unload()
    assert not wrappers(merged) and set(merged.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(logits(merged, case.inputs()), adapted, rtol=1e-4, atol=1e-4)
    bare = model.unload()
    assert not wrappers(bare) and torch.equal(logits(bare, case.inputs()), plain)


@pytest.mark.parametrize("save_basis", [False, True], ids=["R only", "with basis"])
def test_train_save_load(case, save_basis, tmp_path):
    model = case.model(save_basis=save_basis)
    before = logits(model, case.inputs())
    train(model, case)
    assert not torch.equal(logits(model, case.inputs()), before)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(v.shape) for k, v in stored.items() if "experts" in k and k.endswith("weight")} == {(3, 4, 4)}
    assert {tuple(v.shape) for k, v in stored.items() if "experts" in k and k.endswith("sketch")} == {(3, 5, 4)}
    assert any(key.endswith(".bt") for key in stored) is save_basis
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    torch.testing.assert_close(logits(loaded, case.inputs()), logits(model, case.inputs()), rtol=1e-5, atol=1e-5)
    if not save_basis:
        with pytest.raises(ValueError, match="another base model, revision or quantisation"):
            PeftModel.from_pretrained(case.base(seed=1), tmp_path)


def test_signs_of_single_experts_are_turned_back(tmp_path):
    case = MOE["mixtral"]
    model = case.model(target_modules=[])
    before = logits(model, case.inputs())
    model.save_pretrained(tmp_path)
    for layer in wrappers(model):
        layer.loraxs_A[1, 2] *= -1
        layer.loraxs_Bt[1, 2] *= -1
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    torch.testing.assert_close(logits(model, case.inputs()), before, rtol=1e-4, atol=1e-4)


def test_several_adapters(case):
    model = case.model(target_modules=[])
    model.add_adapter("large", case.config(target_modules=[], r=7, init_seed=1))
    assert len(wrappers(model)) == 4 and all(layer.basis_rank == 7 for layer in wrappers(model))
    for names in (["large"], ["default"], ["default", "large"]):
        model.base_model.set_adapter(names)
        expected = logits(dense(case, model, *names), case.inputs())
        torch.testing.assert_close(logits(model, case.inputs()), expected, rtol=1e-4, atol=1e-4)
    both = logits(model, case.inputs())
    model.base_model.add_weighted_adapter(["default", "large"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, case.inputs()), both, rtol=1e-4, atol=1e-4)
    model.delete_adapter("sum")
    model.delete_adapter("large")
    model.set_adapter("default")
    expected = logits(dense(case, model, "default"), case.inputs())
    torch.testing.assert_close(logits(model, case.inputs()), expected, rtol=1e-4, atol=1e-4)


def test_mixed_batches_are_refused_where_experts_would_differ():
    case = MOE["mixtral"]
    model = case.model()
    with pytest.raises(ValueError, match="expected adapters without target_parameters in a mixed batch"):
        model(**case.inputs(2), adapter_names=["default", "__base__"])
    plain = logits(model, case.inputs(2), adapter_names=["__base__"] * 2)
    assert torch.equal(plain, logits(case.base(), case.inputs(2)))
    model.add_adapter("linear", case.config(target_parameters=None, init_seed=1))
    mixed = logits(model, case.inputs(2), adapter_names=["linear", "__base__"])
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], plain[0], atol=1e-3)


def test_half_precision_and_generation(case):
    model = case.model(dtype=torch.bfloat16)
    assert all(layer.loraxs_A.dtype == torch.bfloat16 for layer in wrappers(model))
    assert all(layer.loraxs_R["default"].weight.dtype == torch.float32 for layer in wrappers(model))
    assert model.generate(**case.inputs(), max_new_tokens=2, do_sample=False).shape == (4, 8)


def test_matrix_parameter():
    case = MOE["mixtral"]
    model = case.model(target_modules=[], target_parameters=["mlp.gate.weight"], r=2)
    base = case.base()
    for layer in wrappers(model):
        assert layer.num_experts is None and layer.loraxs_R["default"].weight.shape == (2, 2)
        base.get_submodule(layer.key.rpartition(".")[0]).weight.data += layer.get_delta_weight("default").detach()
    found = logits(model, case.inputs())
    torch.testing.assert_close(found, logits(base, case.inputs()), rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, case.inputs()), found, rtol=1e-4, atol=1e-4)


def test_bad_targets_are_refused_by_name():
    case = MOE["mixtral"]
    with pytest.raises(TypeError, match="target_parameters: expected a list of names, got 'experts.down_proj'"):
        case.config(target_parameters="experts.down_proj")
    with pytest.raises(ValueError, match="loraxs_dropout: expected 0 with target_parameters"):
        case.config(loraxs_dropout=0.1)
    model = case.model()
    with pytest.raises(ValueError, match="target_parameters: expected those of adapter 'default'"):
        model.add_adapter("other", case.config(target_parameters=PARAMETERS[:1]))
    with pytest.raises(TypeError, match="norm.weight: expected .N, K. or .E, N, K. of a floating-point dtype, got"):
        case.model(target_modules=[], target_parameters=["model.norm.weight"])


def test_unknown_architecture_needs_no_target_modules():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Module()
            self.experts.weight = nn.Parameter(torch.randn(2, 6, 5))
            self.experts.forward = lambda x: torch.einsum("eni,bi->ben", self.experts.weight, x)

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x)

    model = get_peft_model(Block(), LoraXSConfig(r=2, target_parameters=["experts.weight"], init_weights=False))
    (layer,) = wrappers(model)
    x = torch.randn(3, 5)
    weight = layer.stored_weight() + delta(layer, "default")
    torch.testing.assert_close(model(x), torch.einsum("eni,bi->ben", weight, x), rtol=1e-4, atol=1e-4)
