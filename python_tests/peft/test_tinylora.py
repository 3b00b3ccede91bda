"""TinyLoRA as a parametrisation of LoRA-XS: the same life as an adapter with a matrix, the numbers of PEFT's own."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel, TinyLoraConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.tuners.tinylora import TinyLoraLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

import loraxs_ext.peft.bases as bases
from loraxs_ext.layers import TinyCore
from loraxs_ext.peft import LoraXSConfig

from ..copies import COPIERS
from .models import CASES, Case, alone, layers_of, logits, train
from .test_checkpoint import ROUTES, flipped
from .test_training import arguments, one_process, rows
from .test_transport import Net, adapted

__all__ = ["one_process"]

U = 5


@pytest.fixture(autouse=True)
def _tiny_cases(monkeypatch):
    """Every configuration of the cases is a TinyLoRA's, tied in small groups, unless a test says otherwise."""
    plain = Case.config

    def config(self, **changes):
        tiny = {"use_tinylora": True, "u": U, "weight_tying": 0.5, "r": 3, "lora_alpha": 3, "sigma": "sqrt"}
        return plain(self, **{**tiny, **changes})

    monkeypatch.setattr(Case, "config", config)


def same(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def cores_of(model: nn.Module, adapter: str = "default") -> list[TinyCore]:
    return [layer.core(adapter) for layer in layers_of(model) if adapter in layer.loraxs_R]


def vectors(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    """One per group."""
    return [core.v.detach().clone() for core in cores_of(model, adapter) if core.v is not None]


# What PEFT's TinyLoRA computes


def peft_twin(case: Case, model: nn.Module, weight_tying: float):
    """PEFT's own adapter with the v, A and B of `model`; its P is its own."""
    config = TinyLoraConfig(r=3, u=U, weight_tying=weight_tying, target_modules=list(case.targets), task_type=case.task)
    twin = get_peft_model(case.base(), config).eval()
    theirs = [module for module in twin.modules() if isinstance(module, TinyLoraLayer)]
    for tiny, layer in zip(theirs, layers_of(model), strict=True):
        a, b = layer.get_basis("default")
        tiny.tinylora_A["default"].copy_(a)
        tiny.tinylora_B["default"].copy_(b)
        tiny.tinylora_v["default"][tiny._tinylora_v_key["default"]].data.copy_(layer.core("default").vector)
    return twin, theirs


@pytest.mark.parametrize("weight_tying", [0.0, 0.4, 1.0])
def test_the_numbers_are_those_of_peft(case: Case, weight_tying):
    model = case.model(weight_tying=weight_tying)
    twin, theirs = peft_twin(case, model, weight_tying)
    for tiny, core in zip(theirs, cores_of(model), strict=True):
        assert torch.equal(tiny.tinylora_P["default"], core.on_basis) and torch.equal(core.placed, core.on_basis)
    assert model.get_nb_trainable_parameters()[0] == twin.get_nb_trainable_parameters()[0]
    same(logits(model, case.inputs()), logits(twin, case.inputs()), 5e-6)
    assert not torch.allclose(logits(model, case.inputs()), logits(case.base(), case.inputs()), atol=1e-2)

    for each in (model, twin):
        for _ in range(2):  # gradients of tied modules and of two batches accumulate
            each(**case.inputs(), labels=case.labels()).loss.backward()
    groups = twin.base_model.tinylora_v["default"].values()
    ours = [core.v.grad for core in cores_of(model) if core.v is not None]
    for mine, group in zip(ours, groups, strict=True):
        same(mine, group.grad, 1e-4)


def test_bases_of_peft_up_to_signs(llama: Case):
    model = llama.model(svd="exact")
    config = TinyLoraConfig(r=3, u=U, target_modules=list(llama.targets), task_type=llama.task)
    theirs = [m for m in get_peft_model(llama.base(), config).modules() if isinstance(m, TinyLoraLayer)]
    for tiny, layer in zip(theirs, layers_of(model), strict=True):
        a, b = layer.get_basis("default")
        same(a.abs(), tiny.tinylora_A["default"].abs(), 1e-4)
        same(b.abs(), tiny.tinylora_B["default"].abs(), 1e-4)


# The life of an adapter


def test_only_v_is_trainable_and_training_moves_only_v(case: Case):
    model = case.model(init_weights=True)
    same(logits(model, case.inputs()), logits(case.base(), case.inputs()), 1e-5)
    head = {"classifier", "score"} if case.task == "SEQ_CLS" else set()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith(".loraxs_R.default.v") or any(h in n for h in head) for n in trainable)
    before = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    train(model, case)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(before[name])) != (name in trainable), name


def test_one_number_for_a_whole_model(case: Case, tmp_path):
    model = case.model(u=1, weight_tying=1.0, task_type=None)
    assert model.get_nb_trainable_parameters()[0] == 1
    train(model, case)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert [tuple(t.shape) for n, t in tensors.items() if n.endswith(".v")] == [(1,)]
    assert {n.rpartition("loraxs_R.")[2] for n in tensors} == {"v", "seed", "sketch"}
    assert sum(t.numel() * t.itemsize for t in tensors.values()) == 4 + len(layers_of(model)) * (8 + 4 * 5 * 3)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))
    assert loaded.get_nb_trainable_parameters()[0] == 1


@pytest.mark.parametrize("weight_tying", [0.0, 0.5])
def test_save_and_load(case: Case, tmp_path, weight_tying):
    model = case.model(weight_tying=weight_tying)
    train(model, case)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))
    assert len(vectors(loaded, "second")) == len(vectors(model))


@pytest.mark.parametrize("options", [{"save_projection": True}, {"save_basis": True}, {"sigma": "A"}], ids=str)
def test_save_and_load_with(llama: Case, tmp_path, options):
    model = llama.model(**options)
    train(model, llama)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.base(), tmp_path)
    assert torch.equal(logits(loaded, llama.inputs()), logits(model, llama.inputs()))
    stored = {n.rpartition(".")[2] for n in load_file(tmp_path / "adapter_model.safetensors")}
    extra = {"save_projection": {"projections"}, "save_basis": {"a", "bt"}}.get(next(iter(options)), set())
    assert stored == {"v", "seed", "sketch"} | extra


def test_disable_merge_and_unload(case: Case):
    model = case.model()
    inputs = case.inputs()
    adapted, base = logits(model, inputs), logits(case.base(), inputs)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    model.merge_adapter(safe_merge=True)
    same(logits(model, inputs), adapted)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), adapted)
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers_of(merged)
    same(logits(merged, inputs), adapted)


@pytest.mark.parametrize("copier", COPIERS)
def test_copies_are_independent(case: Case, copier):
    model = case.model()
    expected = logits(model, case.inputs())
    twin = copier(model)
    assert torch.equal(logits(twin, case.inputs()), expected)
    assert twin.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    for core in cores_of(model):
        core.vector.data.zero_()
    assert torch.equal(logits(twin, case.inputs()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_base_dtypes(case: Case, dtype, tmp_path):
    model = case.model(dtype=dtype)
    assert {v.dtype for v in vectors(model)} == {torch.float64 if dtype == torch.float64 else torch.float32}
    train(model, case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(dtype=dtype), tmp_path)
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


def test_a_model_that_is_cast_keeps_v(case: Case):
    model = case.model()
    exact, before = logits(model, case.inputs()), vectors(model)
    model.to(torch.bfloat16)
    same(logits(model, case.inputs()).float(), exact, 0.15)
    assert all(torch.equal(now, old) for now, old in zip(vectors(model), before, strict=True))


def test_gradient_checkpointing_gives_the_same_gradients(case: Case):
    def gradients(checkpointing: bool):
        model = case.model(weight_tying=1.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        train(model, case, steps=1, lr=0.0)
        return cores_of(model)[0].v.grad

    same(gradients(True), gradients(False), 1e-5)


def test_status(case: Case):
    model = case.model()
    status = model.get_model_status()
    assert status.enabled and status.active_adapters == status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]


def test_peft_converts_it_to_lora(llama: Case):
    model = llama.model(task_type=None)
    config, tensors = convert_to_lora(model, rank=3)
    lora = get_peft_model(llama.base(), config)
    set_peft_model_state_dict(lora, tensors)
    same(logits(lora.eval(), llama.inputs()), logits(model, llama.inputs()), 1e-3)


# Several adapters


def test_a_second_adapter_with_other_targets_disturbs_nothing(case: Case):
    model = case.model()
    before, state = logits(model, case.inputs()), [core.placed.clone() for core in cores_of(model)]
    # First a narrower choice, whose layers have other numbers than in the first adapter.
    target = [case.targets[-1]]
    model.add_adapter("other", case.config(target_modules=target, init_seed=1, weight_tying=1.0))
    assert torch.equal(logits(model.eval(), case.inputs()), before)
    assert all(torch.equal(core.placed, old) for core, old in zip(cores_of(model), state, strict=True))
    model.set_adapter("other")
    alone = case.model(target_modules=target, init_seed=1, weight_tying=1.0)
    same(logits(model, case.inputs()), logits(alone, case.inputs()))
    train(model, case)
    assert len(vectors(model, "other")) == 1
    model.set_adapter("default")
    assert torch.equal(logits(model, case.inputs()), before)


def test_deleting_and_adding_again(case: Case):
    model = case.model()
    before = logits(model, case.inputs())
    model.add_adapter("other", case.config(r=4, init_seed=1))
    model.set_adapter("other")
    other = logits(model, case.inputs())
    model.delete_adapter("default")
    assert torch.equal(logits(model, case.inputs()), other)
    model.add_adapter("default", case.config())
    model.set_adapter("default")
    same(logits(model, case.inputs()), before)


def test_mixed_batches(case: Case):
    """PEFT's TinyLoRA ignores adapter_names; here every row is served as if it were alone."""
    model = case.model()
    model.add_adapter("one", case.config(u=1, weight_tying=1.0, init_seed=3, r=2, lora_alpha=2))
    model.add_adapter("matrix", case.config(use_tinylora=False, r=4, lora_alpha=4))
    model.eval()
    names = ["default", "__base__", "one", "matrix"]
    inputs = case.inputs(len(names))
    mixed = logits(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        single = {key: value[row : row + 1] for key, value in inputs.items()}
        same(mixed[row : row + 1], alone(model, name, lambda single=single: logits(model, single)))
    assert len({tuple(row.flatten().tolist()) for row in mixed}) == len(names)


def test_weighted_sum_is_an_exact_matrix(llama: Case, tmp_path):
    model = llama.model()
    model.add_adapter("other", llama.config(r=4, u=2, weight_tying=1.0, init_seed=1, projection_seed=9))
    model.add_adapter("matrix", llama.config(use_tinylora=False, r=2))
    model.add_weighted_adapter(["default", "other", "matrix"], [0.7, -1.5, 2.0], "sum")
    for layer in layers_of(model):
        deltas = [layer.get_delta_weight(name) for name in ("default", "other", "matrix")]
        same(layer.get_delta_weight("sum"), 0.7 * deltas[0] - 1.5 * deltas[1] + 2.0 * deltas[2], 1e-6)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert not json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["use_tinylora"]
    loaded = PeftModel.from_pretrained(llama.base(), tmp_path / "sum")
    same(logits(loaded, llama.inputs()), logits(model, llama.inputs()))


# A basis that is another than the one v was trained on


@pytest.fixture
def saved(llama: Case, tmp_path):
    """A trained adapter on disk, its logits and its vectors."""
    model = llama.model()
    train(model, llama)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", logits(model, llama.inputs()), vectors(model)


every_route = pytest.mark.parametrize("load", ROUTES, ids=lambda f: f.__name__)


@every_route
def test_same_base_gives_the_same_logits(llama: Case, saved, load):
    path, expected, _ = saved
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA-XS")
        assert torch.equal(logits(load(llama, llama.base(), path), llama.inputs()), expected)


@every_route
def test_wrong_base_is_refused_with_numbers(llama: Case, saved, load):
    with pytest.raises(ValueError, match=r"another base model.* of 6 of 6 modules .*worst module .*error 1?\.?\d+"):
        logits(load(llama, llama.base(seed=1), saved[0]), llama.inputs())


@every_route
def test_flipped_signs_change_neither_v_nor_the_file(llama: Case, saved, load, monkeypatch, tmp_path):
    path, expected, trained = saved
    with monkeypatch.context() as patched:
        flipped(patched)
        model = load(llama, llama.base(), path)
        same(logits(model, llama.inputs()), expected, 1e-5)
        _ = [core.sketch for core in cores_of(model)]  # unsettles: found out and placed once more, not twice
        same(logits(model, llama.inputs()), expected, 1e-5)
    assert not torch.equal(cores_of(model)[0].placed, cores_of(model)[0].on_basis)
    assert all(torch.equal(now, old) for now, old in zip(vectors(model), trained, strict=True))
    model.save_pretrained(tmp_path / "again")
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (path, tmp_path / "again")]
    assert all(torch.equal(tensors[0][name.replace(".default", "")], tensor) for name, tensor in tensors[1].items())
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "fresh"))
    same(logits(PeftModel.from_pretrained(llama.base(), tmp_path / "again"), llama.inputs()), expected, 1e-6)


def tiny_net(model: nn.Module, **fields) -> PeftModel:
    options = {"use_tinylora": True, "u": 4, "weight_tying": 1.0, "sigma": "sqrt"}
    return adapted(model, **{**options, **fields})


def rotated(monkeypatch) -> None:
    """From now on the 2nd and 3rd vectors, of nearly equal singular values, are turned into each other."""
    decompose = bases.basis.decompose

    def decompose_rotated(*args, **kwargs):
        result = decompose(*args, **kwargs)
        for key, factors in result.items():
            turn = torch.eye(len(factors.a), dtype=torch.float64)
            turn[1:3, 1:3] = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
            a, bt = ((turn @ part.double()).to(part) for part in (factors.a, factors.bt))
            result[key] = factors._replace(a=a, bt=bt)
        return result

    monkeypatch.setattr(bases.basis, "decompose", decompose_rotated)


def test_beside_another_adapter_p_is_moved_onto_the_common_basis(monkeypatch, tmp_path):
    x = torch.randn(5, 96)
    model = tiny_net(Net(), save_basis=True)
    model.save_pretrained(tmp_path / "tiny")
    with monkeypatch.context() as patched:
        rotated(patched)
        patched.setenv("LORAXS_CACHE", str(tmp_path / "fresh"))
        other = adapted(Net(), sigma="sqrt")
        before = other(x)
        other.load_adapter(tmp_path / "tiny", "tiny")
        assert torch.equal(other(x), before)
    other.set_adapter("tiny")
    core = cores_of(other, "tiny")[0]
    assert (core.placed - core.on_basis).abs().max() > 0.01
    same(other(x), model(x), 1e-4)
    assert torch.equal(cores_of(other, "tiny")[0].vector, cores_of(model)[0].vector)
    # What is saved there still belongs to the basis it was trained on.
    other.save_pretrained(tmp_path / "again", selected_adapters=["tiny"])
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "again" / "tiny")
    assert torch.equal(loaded(x), model(x))


def test_an_anchor_brings_the_old_basis_back(monkeypatch, tmp_path):
    x = torch.randn(5, 96)
    model = tiny_net(Net())
    model.save_pretrained(tmp_path)
    # Other factors than the cached ones; the anchors of the old basis remain.
    anchors = bases.anchors_path({}, model.peft_config["default"].recipe()).parent
    for path in anchors.parent.glob("*.safetensors"):
        path.unlink()
    rotated(monkeypatch)
    same(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x), 1e-4)
    shutil.rmtree(anchors)
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_a_basis_of_other_directions_is_refused(tmp_path):
    model = tiny_net(Net(), save_basis=True)
    model.save_pretrained(tmp_path)
    other = adapted(Net(seed=1), sigma="sqrt")
    with pytest.raises(ValueError, match=r"of 2 of 2 modules do not match \(worst module .*: error 0\.\d+"):
        other.load_adapter(tmp_path, "tiny")


def test_hotswap_takes_over_the_projections(llama: Case, tmp_path):
    other = llama.model(projection_seed=100, init_seed=3)
    other.save_pretrained(tmp_path)
    model = llama.model()
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(logits(model, llama.inputs()), logits(other, llama.inputs()))


@pytest.mark.parametrize("change", [{"use_tinylora": False}, {"u": 6}, {"weight_tying": 1.0}], ids=str)
def test_hotswap_refuses_what_it_cannot_exchange(llama: Case, change, tmp_path):
    llama.model(**change).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Configs are incompatible"):
        hotswap_adapter(llama.model(), str(tmp_path), "default", torch_device="cpu")


# Training


def test_trainer_resumes_where_it_stopped(bert: Case, tmp_path):
    whole, resumed = (bert.model(loraxs_dropout=0.1) for _ in range(2))
    start = vectors(whole)
    Trainer(whole, arguments(tmp_path / "whole"), train_dataset=rows(bert)).train()
    assert not any(torch.equal(v, old) for v, old in zip(vectors(whole), start, strict=True))
    Trainer(resumed, arguments(tmp_path / "again"), train_dataset=rows(bert)).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert all(torch.equal(a, b) for a, b in zip(vectors(resumed), vectors(whole), strict=True))


def test_distributed_data_parallel(llama: Case, one_process):
    model = llama.model(weight_tying=1.0).train()
    wrapped = DistributedDataParallel(model)
    assert {name for name, _ in model.named_buffers() if "loraxs_" in name} <= wrapped.parameters_to_ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped(**llama.inputs(), labels=llama.labels()).loss.backward()
    alone = llama.model(weight_tying=1.0)
    alone(**llama.inputs(), labels=llama.labels()).loss.backward()
    same(cores_of(model)[0].v.grad, cores_of(alone)[0].v.grad, 1e-5)


# The configuration


def test_configuration_survives_json(llama: Case, saved):
    config = LoraXSConfig.from_pretrained(saved[0])
    assert (config.use_tinylora, config.u, config.weight_tying, config.projection_seed) == (True, U, 0.5, 42)


@pytest.mark.parametrize(
    "field, value, error, message",
    [
        ("u", 0, ValueError, "u: expected a positive integer, got 0"),
        ("u", 2.0, TypeError, "u: expected an int, got 2.0"),
        ("weight_tying", 1.5, ValueError, r"weight_tying: expected a ratio in \[0, 1\], got 1.5"),
        ("projection_seed", -1, ValueError, r"projection_seed: expected a seed in \[0, 2\^62\), got -1"),
        ("init_v_bound", float("nan"), ValueError, "init_v_bound: expected a bound of at least 0, got nan"),
        ("init_weights", "svd", ValueError, "init_weights: expected True, False, 'zeros' or 'uniform', got 'svd'"),
    ],
)
def test_configuration_is_checked(field, value, error, message):
    with pytest.raises(error, match=message):
        LoraXSConfig(use_tinylora=True, **{field: value})


def test_uniform_belongs_to_v():
    with pytest.raises(ValueError, match="init_weights: expected True, False or 'zeros', got 'uniform'"):
        LoraXSConfig(init_weights="uniform")


def test_cases_have_groups_and_a_remainder():
    sizes = {name: (len(layers_of(case.model())), len(vectors(case.model()))) for name, case in CASES.items()}
    assert sizes["llama"] == (6, 3) and sizes["bert"][0] % sizes["bert"][1]
