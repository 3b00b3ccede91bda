"""The reference's call on PEFT's LoRA models: what it promises holds here, and what it gets wrong does not."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from loraxs_ext import LoraXSConfig, LoraXSModel, find_and_initialize
from loraxs_ext.basis import randomized_svd

from .models import Case, layers_of, logits

TruncatedSVD = pytest.importorskip("sklearn.decomposition").TruncatedSVD

# config/reconstruct_config.yaml, as YAML reads it.
YAML = {
    "reconstruction_type": "svd",
    "reconstr_mode": "separated",
    "half_init_dec": False,
    "replacement_module_random_init": False,
    "r_squared": True,
    "svd": {"n_iter": 10, "random_state": 42},
}


def options(rank: int = 4, **changes) -> dict:
    """What a script passes: the YAML file with the rank put in."""
    made = {**copy.deepcopy(YAML), **changes}
    made["svd"] = {**made["svd"], "rank": rank}
    return made


def lora_model(case: Case, adapter: str = "default", **changes) -> PeftModel:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": list(case.targets), "task_type": case.task}
    return get_peft_model(case.base(), LoraConfig(**{**fields, **changes}), adapter)


def convert(model: PeftModel, adapter: str = "default", rank: int = 4, **changes) -> PeftModel:
    find_and_initialize(model, dict(model.peft_config), adapter, "svd", options(rank, **changes), None)
    return model


def trained(model: PeftModel) -> PeftModel:
    """R as training might leave it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loraxs_R" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def trainable(model: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


# What the reference promises


def test_a_script_of_the_reference_runs(bert: Case, tmp_path) -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=list(bert.targets), lora_dropout=0.0)
    reconstruction = options()
    model = same = get_peft_model(bert.base(), config)
    find_and_initialize(
        model, {"default": config}, adapter_name="default", reconstr_type="svd", writer=None,
        reconstruct_config=reconstruction,
    )  # fmt: skip
    assert model is same and isinstance(model.base_model, LoraXSModel)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    model.print_trainable_parameters()
    groups = [
        [p for name, p in model.named_parameters() if ("classifier" in name) is head and p.requires_grad]
        for head in (True, False)
    ]
    modules = len(layers_of(model))
    assert modules and sum(p.numel() for p in groups[1]) == modules * 4**2 and len(groups[0]) == 2
    optimizer = torch.optim.AdamW([{"params": groups[0], "lr": 1e-2}, {"params": groups[1], "lr": 5e-2}])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(**bert.inputs(), labels=bert.labels()).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    expected = logits(model, bert.inputs())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert.base(), tmp_path)
    torch.testing.assert_close(logits(again, bert.inputs()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), bert.inputs()), expected, rtol=1e-4, atol=1e-5)


def by_sklearn(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the reference."""
    columns = weight.T.numpy()
    svd = TruncatedSVD(n_components=rank, n_iter=10, random_state=42).fit(columns)
    return torch.from_numpy(svd.transform(columns).T), torch.from_numpy(svd.components_.T)


def test_basis_scaling_and_core_are_the_reference_s(llama: Case) -> None:
    model = lora_model(llama, lora_dropout=0.25, use_rslora=True)
    torch.manual_seed(7)
    convert(model)
    torch.manual_seed(7)
    for layer in layers_of(model):
        # As the reference makes R: a layer, whose own start is overwritten.
        core = nn.Linear(4, 4, bias=False)
        nn.init.normal_(core.weight, std=1e-5)
        assert torch.equal(layer.get_R("default"), core.weight)
        a, b = by_sklearn(layer.get_base_layer().weight.detach(), 4)
        mine = layer.get_basis("default")[1].double() @ layer.get_basis("default")[0].double()
        torch.testing.assert_close(mine, b.double() @ a.double(), rtol=1e-3, atol=1e-4)
        assert layer.scaling["default"] == 8 / 2 and layer.loraxs_dropout["default"].p == 0.25
    assert model.peft_config["default"].recipe().svd == "reference"


def test_sigma_is_edora_s(llama: Case) -> None:
    model = lora_model(llama)
    find_and_initialize(model, model.peft_config, "default", "svd", options(), sigma_val=1.0)
    assert 0.3 < torch.cat([layer.get_R("default").detach().flatten() for layer in layers_of(model)]).std() < 3


def test_edora(bert: Case) -> None:
    model = lora_model(bert, use_dora=True)
    expected = logits(bert.base(), bert.inputs())
    convert(model)
    assert model.peft_config["default"].use_edora
    torch.testing.assert_close(logits(model.eval(), bert.inputs()), expected, rtol=1e-3, atol=1e-3)
    for layer in layers_of(model):
        lengths = layer.frozen_weight().norm(dim=1)
        torch.testing.assert_close(layer.loraxs_magnitude["default"].weight, lengths, rtol=1e-5, atol=1e-5)
    assert sum("loraxs_magnitude" in name for name in trainable(model)) == len(layers_of(model))


def test_iterations_and_seed_are_honoured(llama: Case) -> None:
    one = convert(lora_model(llama), svd={"n_iter": 1, "random_state": 3})
    recipe = one.peft_config["default"].recipe()
    assert (recipe.sklearn_n_iter, recipe.sklearn_random_state) == (1, 3)
    layer = layers_of(one)[0]
    columns = layer.get_base_layer().weight.detach().T.numpy()
    svd = TruncatedSVD(n_components=4, n_iter=1, random_state=3).fit(columns)
    mine = layer.get_basis("default")[1]
    torch.testing.assert_close(mine @ mine.T, torch.from_numpy(svd.components_.T @ svd.components_), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"half_init_dec": True}, {"replacement_module_random_init": True}], ids=["half", "all"]
)
def test_random_bases(llama: Case, changes: dict, tmp_path) -> None:
    r = 5
    model = lora_model(llama, r=r)
    torch.manual_seed(3)
    convert(model, rank=r, **changes)
    torch.manual_seed(3)
    for layer in layers_of(model):
        a, b = layer.get_basis("default")
        exact = randomized_svd(layer.get_base_layer().weight.detach(), r)
        N, K = b.shape[0], a.shape[1]
        if "half_init_dec" in changes:
            drawn = torch.empty(N, r).T
            nn.init.kaiming_uniform_(drawn[3:], a=math.sqrt(5))
            assert torch.equal(b[:, 3:].T, drawn[3:]) and drawn[3:].abs().max() <= 1 / math.sqrt(N)
            torch.testing.assert_close((b[:, :3] * exact.U[:, :3]).sum(0).abs(), torch.ones(3), rtol=0, atol=1e-2)
        else:
            columns, rows = torch.empty(K, r), torch.empty(N, r).T
            nn.init.kaiming_uniform_(columns, a=math.sqrt(5))
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
            assert torch.equal(a, columns.T) and torch.equal(b, rows.T)
            assert 0.9 / math.sqrt(r) < a.abs().max() <= 1 / math.sqrt(r)
        core = nn.Linear(r, r, bias=False)
        nn.init.normal_(core.weight, std=1e-5)
        assert torch.equal(layer.get_R("default"), core.weight)
    expected = logits(trained(model), llama.inputs())
    model.save_pretrained(tmp_path)
    # Nobody can draw them again: they are in the file.
    assert any(name.endswith("loraxs_R.a") for name in load_file(tmp_path / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama.base(), tmp_path), llama.inputs()), expected)


def test_without_r_squared_it_is_lora(llama: Case) -> None:
    model = lora_model(llama)
    torch.manual_seed(3)
    convert(model, r_squared=False)
    torch.manual_seed(3)
    found = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert found and not layers_of(model)
    for layer in found:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.requires_grad and b.requires_grad
        assert torch.equal(a, nn.init.normal_(torch.empty(a.shape), std=1e-5))
        components = by_sklearn(layer.get_base_layer().weight.detach(), 4)[1]
        torch.testing.assert_close((b * components).sum(0).abs(), torch.ones(4), rtol=0, atol=1e-4)


# What the reference gets wrong


def test_any_adapter_name_and_targets_as_text(llama: Case) -> None:
    for targets in (r".*\.(q_proj|down_proj)", "all-linear"):
        lora = lora_model(llama, "mine", target_modules=targets)
        names = {name for name, module in lora.named_modules() if isinstance(module, LoraLayer)}
        model = convert(lora, "mine")
        assert {f"base_model.model.{layer.key}" for layer in layers_of(model)} == names
        assert set(model.peft_config) == {"mine"} and model.active_adapters == ["mine"]


def test_all_linear_leaves_the_head_alone(bert: Case) -> None:
    """The reference decomposes the classifier too, and fails where r exceeds the number of classes."""
    model = convert(lora_model(bert, r=8, target_modules="all-linear"), rank=8)
    assert not [layer.key for layer in layers_of(model) if "classifier" in layer.key]
    assert len([name for name in trainable(model) if "classifier" in name]) == 2


def test_targets_are_whole_names() -> None:
    """For the reference "v_proj" is the end of "qkv_proj" too."""
    base = nn.Module()
    base.v_proj, base.qkv_proj, base.config = nn.Linear(12, 12), nn.Linear(12, 12), SimpleNamespace()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["v_proj"]))
    assert [layer.key for layer in layers_of(convert(model, rank=2))] == ["v_proj"]


def test_rank_and_alpha_patterns(llama: Case) -> None:
    model = convert(lora_model(llama, rank_pattern={"down_proj": 6}, alpha_pattern={"q_proj": 2}))
    found = {layer.key.rsplit(".", 1)[1]: (layer.r["default"], layer.scaling["default"]) for layer in layers_of(model)}
    assert found == {"q_proj": (4, 0.5), "v_proj": (4, 2.0), "down_proj": (6, 8 / 6)}


def test_a_second_adapter_has_its_own_core(llama: Case, tmp_path) -> None:
    model = convert(lora_model(llama))
    second = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    find_and_initialize(model, {"second": second}, "second", "svd", options())
    trained(model)
    first, both = logits(model, llama.inputs()), [layer for layer in layers_of(model) if "second" in layer.r]
    assert both and all(not torch.equal(layer.get_R("second"), layer.get_R("default")) for layer in both)
    model.set_adapter("second")
    assert not torch.equal(logits(model, llama.inputs()), first)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "second" / "adapter_model.safetensors")) == 2 * len(both)
    mixed = logits(model, llama.inputs(3), adapter_names=["default", "second", "__base__"])
    torch.testing.assert_close(mixed[:1], first[:1])
    torch.testing.assert_close(mixed[2:], logits(llama.base(), llama.inputs(3))[2:])


def test_disabling_freezes_nothing_and_unfreezes_nothing(bert: Case) -> None:
    model = convert(lora_model(bert))
    before = trainable(model)
    with model.disable_adapter():
        pass
    assert trainable(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama: Case, dtype: torch.dtype) -> None:
    model = get_peft_model(llama.base(dtype=dtype), LoraConfig(r=4, target_modules=list(llama.targets)))
    convert(model)
    assert logits(model, llama.inputs()).isfinite().all()
    assert {layer.get_R("default").dtype for layer in layers_of(model)} == {torch.float32}


@pytest.mark.parametrize("r_squared", [True, False])
def test_conv1d(case: Case, r_squared: bool) -> None:
    expected = logits(case.base(), case.inputs())
    model = convert(lora_model(case, fan_in_fan_out=case.targets[0] == "c_attn"), r_squared=r_squared).eval()
    torch.testing.assert_close(logits(model, case.inputs()), expected, rtol=1e-3, atol=1e-3)


def test_evaluation_mode_stays(llama: Case) -> None:
    model = convert(lora_model(llama, lora_dropout=0.5).eval())
    assert not any(module.training for layer in layers_of(model) for module in layer.modules())


# What is refused, and leaves the model as it was


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reconstr_mode": "joint"}, r"\['reconstr_mode'\]: expected 'separated', got 'joint'"),
        ({"reconstruction_type": "qr"}, r"\['reconstruction_type'\]: expected 'svd', got 'qr'"),
        ({"half_init_enc": True}, r"got \['half_init_enc'\] too"),
        ({"r_squared": "yes"}, r"\['r_squared'\]: expected True or False, got 'yes'"),
        ({"svd": {"n_iter": -1}}, r"\['svd'\]\['n_iter'\]: expected a whole number .* got -1"),
        ({"svd": {"random_state": None}}, r"\['svd'\]\['random_state'\]: expected a whole number .* got None"),
        ({"svd": {"n_oversamples": 3}}, r"\['svd'\]: .* got \['n_oversamples'\] too"),
    ],
)
def test_options_are_checked(llama: Case, changes: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        convert(lora_model(llama), **changes)


def test_arguments_are_checked(llama: Case) -> None:
    model = lora_model(llama)
    config = model.peft_config["default"]
    with pytest.raises(ValueError, match="reconstr_type: expected 'svd', got 'qr'"):
        find_and_initialize(model, {"default": config}, "default", "qr", options())
    with pytest.raises(TypeError, match="model: expected a PeftModel, got LlamaForCausalLM"):
        find_and_initialize(llama.base(), {"default": config}, "default", "svd", options())
    with pytest.raises(ValueError, match="peft_config: expected the configuration of 'other'"):
        find_and_initialize(model, {"default": config}, "other", "svd", options())
    with pytest.raises(ValueError, match=r"adapter_name: expected a LoRA adapter of the model, got 'other'"):
        find_and_initialize(model, {"other": config}, "other", "svd", options())
    with pytest.raises(ValueError, match=r"\['rank'\]: expected the r of the adapter, 4, got 8"):
        find_and_initialize(model, {"default": config}, "default", "svd", options(8))
    with pytest.raises(ValueError, match="the model was made with, lora_alpha=8, got lora_alpha=2"):
        find_and_initialize(model, {"default": LoraConfig(r=4, lora_alpha=2)}, "default", "svd", options())
    convert(model)
    with pytest.raises(TypeError, match="expected a LoraConfig, got LoraXSConfig"):
        find_and_initialize(model, model.peft_config, "default", "svd", options())
    with pytest.raises(ValueError, match="got 'default', which is LoRA-XS already"):
        find_and_initialize(model, {"default": config}, "default", "svd", options())
    with pytest.raises(ValueError, match="all adapters of a model share one basis"):
        find_and_initialize(model, {"two": config}, "two", "svd", options(half_init_dec=True))
    with pytest.raises(ValueError, match=r"\['r_squared'\]: expected True in a model of LoRA-XS adapters"):
        find_and_initialize(model, {"two": config}, "two", "svd", options(r_squared=False))


def test_what_loraxs_cannot_be_is_refused(llama: Case) -> None:
    with pytest.raises(ValueError, match=r"LoRA options without a counterpart .* got \{'lora_bias': True\}"):
        convert(lora_model(llama, lora_bias=True))
    with pytest.raises(ValueError, match="init_lora_weights: expected one of .* got 'pissa'"):
        convert(lora_model(llama, init_lora_weights="pissa"))
    two = lora_model(llama)
    two.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got 'default' beside \['two'\]"):
        convert(two)
    merged = lora_model(llama)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="expected an adapter that is not merged"):
        convert(merged)


def test_a_failure_leaves_the_lora_model(llama: Case) -> None:
    model = lora_model(llama, init_lora_weights=False).eval()
    expected, before = logits(model, llama.inputs()), trainable(model)
    weight = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.base_layer").weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="q_proj"):
        convert(model)
    with torch.no_grad():
        weight.copy_(kept)
    assert isinstance(model.peft_config["default"], LoraConfig) and trainable(model) == before
    assert torch.equal(logits(model, llama.inputs()), expected)
    convert(model)
    assert isinstance(model.peft_config["default"], LoraXSConfig)
