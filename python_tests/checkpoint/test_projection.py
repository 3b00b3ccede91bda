"""LoRA → LoRA-XS: the best R for the basis, what it lost, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from loraxs_ext import LoraXSConfig, from_lora
from loraxs_ext.checkpoint import ProjectionError, import_lora, residuals

from ..peft.models import CASES, Case, layers_of, logits, train
from .folders import Folders

# Square layers, whose basis of full rank spans both sides: it holds any LoRA.
SQUARE = {
    "bert": ["query", "value"],
    "llama": ["q_proj", "o_proj"],
    "gpt2": r".*attn\.c_proj",
    "t5": ["q", "v"],
}


def lora(case: Case, path: Path, **config: Any) -> tuple[Folders, PeftModel]:
    """A base and a stock LoRA of it, with a trained head where the task has one, in folders."""
    case.base().save_pretrained(path / "base", max_shard_size="10KB")
    folders = Folders(case, path / "base", path / "lora")
    options = {"r": 3, "lora_alpha": 5, "target_modules": list(case.targets), "task_type": case.task}
    model = get_peft_model(folders.load(), LoraConfig(**{**options, "init_lora_weights": False, **config})).eval()
    if case.task == "SEQ_CLS":
        train(model, case)
    model.save_pretrained(folders.adapter)
    return folders, model


def true_residuals(model: PeftModel, adapted: PeftModel) -> tuple[dict[str, float], float]:
    """The same from full matrices."""
    squares, found = [], {}
    mine = {layer.key: layer.get_delta_weight("default") for layer in layers_of(adapted)}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            delta = layer.get_delta_weight("default").detach().double()
            lost = delta - mine[name].detach().double()
            squares.append((float(lost.norm() ** 2), float(delta.norm() ** 2)))
            found[name] = float(lost.norm() / delta.norm())
    return found, math.sqrt(sum(lost for lost, _ in squares) / sum(size for _, size in squares))


@pytest.mark.parametrize("name", CASES)
def test_a_basis_of_full_rank_holds_any_lora(name: str, tmp_path: Path) -> None:
    folders, model = lora(CASES[name], tmp_path, target_modules=SQUARE[name])
    adapted = from_lora(folders.load(), folders.adapter, LoraXSConfig(r=64, svd="exact")).eval()
    wanted = folders.logits(model)
    torch.testing.assert_close(folders.logits(adapted), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - folders.logits(folders.load())).abs().max() > 1e-2
    assert residuals(adapted, folders.adapter).residual < 1e-5


@pytest.mark.parametrize("sigma", ["A", "sqrt", "B"])
def test_residuals_are_those_of_the_full_matrices(sigma: Any, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2.0}, "use_rslora": True}
    folders, model = lora(CASES["llama"], tmp_path, **patterns)
    config = LoraXSConfig(r=8, lora_alpha=3, sigma=sigma, rank_pattern={"down_proj": 20}, svd="exact")
    adapted = from_lora(folders.load(), folders.adapter, config, threshold=1)
    wanted, overall = true_residuals(model, adapted)
    found = residuals(adapted, folders.adapter)
    assert {m.key: m.residual for m in found.modules} == pytest.approx(wanted, abs=1e-5)
    assert found.residual == pytest.approx(overall, abs=1e-5) and 0.5 < overall < 1
    assert {m.key: m.rank for m in found.modules} == {layer.key: layer.r["default"] for layer in layers_of(adapted)}


def test_no_other_r_is_nearer(tmp_path: Path) -> None:
    folders, _ = lora(CASES["llama"], tmp_path)
    adapted = from_lora(folders.load(), folders.adapter, LoraXSConfig(r=8), threshold=1)
    best = residuals(adapted, folders.adapter).residual
    for _ in range(5):
        kept = [layer.get_R("default").detach().clone() for layer in layers_of(adapted)]
        with torch.no_grad():
            for layer, core in zip(layers_of(adapted), kept, strict=True):
                layer.get_R("default").add_(torch.randn_like(core) * core.std() * 0.1)
        assert residuals(adapted, folders.adapter).residual > best
        with torch.no_grad():
            for layer, core in zip(layers_of(adapted), kept, strict=True):
                layer.get_R("default").copy_(core)


def test_what_is_not_targeted_is_lost(tmp_path: Path) -> None:
    folders, _ = lora(CASES["llama"], tmp_path)
    adapted = from_lora(folders.load(), folders.adapter, LoraXSConfig(r=64, target_modules=["q_proj"]), threshold=1)
    found = residuals(adapted, folders.adapter)
    assert {m.residual > 0.5 for m in found.modules if "q_proj" not in m.key} == {True}
    assert [m.rank for m in found.modules if m.residual == 1.0] == [0, 0, 0, 0]
    assert max(m.residual for m in found.modules if "q_proj" in m.key) < 1e-5
    # And what the LoRA leaves alone stays so.
    folders, model = lora(CASES["llama"], tmp_path / "few", target_modules=["q_proj"])
    adapted = from_lora(folders.load(), folders.adapter, LoraXSConfig(r=64, target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(folders.logits(adapted), folders.logits(model), rtol=1e-4, atol=1e-4)


def test_above_the_threshold_it_raises_with_numbers_and_leaves_the_model_alone(tmp_path: Path) -> None:
    folders, _ = lora(CASES["llama"], tmp_path)
    base = folders.load()
    before = folders.logits(base)
    with pytest.raises(ProjectionError, match=r"residual of at most 0.1, .* 6 modules is 0\.\d+ .*at rank 4") as caught:
        from_lora(base, folders.adapter, LoraXSConfig(r=4))
    assert 0.5 < caught.value.projection.residual < 1 and len(caught.value.projection.modules) == 6
    assert not layers_of(base) and torch.equal(folders.logits(base), before)
    adapted = from_lora(base, folders.adapter, LoraXSConfig(r=4), threshold=1)
    with pytest.raises(ProjectionError):
        from_lora(adapted, folders.adapter, LoraXSConfig(r=4), adapter_name="second")
    assert list(adapted.peft_config) == ["default"]
    with pytest.raises(ValueError, match="adapter_name: expected a new name"):
        from_lora(adapted, folders.adapter, LoraXSConfig(r=4), threshold=1)


def test_a_second_adapter_and_training_on(tmp_path: Path) -> None:
    folders, model = lora(CASES["bert"], tmp_path, target_modules=SQUARE["bert"])
    adapted = get_peft_model(folders.load(), folders.case.config(r=48, svd="exact")).eval()
    config = LoraXSConfig(r=48, svd="exact")
    assert from_lora(adapted, folders.adapter, config, adapter_name="lora") is adapted
    adapted.set_adapter("lora")
    before = logits(adapted, folders.case.inputs())
    torch.testing.assert_close(before, folders.logits(model), rtol=1e-4, atol=1e-4)
    train(adapted, folders.case)
    assert (logits(adapted, folders.case.inputs()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_from_folder_to_folder(name: str, tmp_path: Path) -> None:
    folders, model = lora(CASES[name], tmp_path, target_modules=SQUARE[name])
    config = LoraXSConfig(r=64, svd="exact")
    projection = import_lora(folders.base, folders.adapter, tmp_path / "xs", config, progress=False)
    assert projection.residual < 1e-5
    loaded = folders.adapted(tmp_path / "xs")
    assert layers_of(loaded) and loaded.peft_config["default"].base_fingerprint
    torch.testing.assert_close(folders.logits(loaded), folders.logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(ProjectionError):
        import_lora(folders.base, folders.adapter, tmp_path / "small", LoraXSConfig(r=2), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "xs"]


# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora: expected a plain LoRA.*DoRA's magnitudes"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["x.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"a_field_of_the_future": 1}, "a_field_of_the_future"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*path_initial_model_for_weight_conversion"),
        ({"bias": "all"}, "bias: expected 'none'"),
        ({"peft_type": "VERA"}, "peft_type: expected 'LORA', got 'VERA'"),
        ({"r": 10**12}, "expected lora_A \\[1000000000000, K\\]"),
        ({"r": "3"}, "rank of r: expected a positive integer, got '3'"),
        ({"r": True}, "rank of r"),
        ({"lora_alpha": float("inf")}, "alpha of lora_alpha"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: expected numbers by name"),
        ({"rank_pattern": {"(": 3}}, "expected a regular expression"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_variants_and_nonsense_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folders, _ = lora(CASES["llama"], tmp_path)
    path = folders.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(ValueError, match=message):
        from_lora(folders.load(), folders.adapter, LoraXSConfig(r=64))


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x7f" * 8), "damaged"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(
                (96).to_bytes(8, "little")
                + b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,16]}}'.ljust(96)
            ),
            "damaged",
        ),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickled adapters are not read"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "expected a JSON object"),
        (lambda f: (f / "adapter_config.json").write_text("3"), "expected a JSON object, got int"),
        (
            lambda f: (f / "adapter_config.json").write_text(" " * (1 << 25)),
            "expected a JSON object of at most 16777216 bytes",
        ),
        (_tensors(lambda t: t.pop(f"{_Q}_A.weight")), "expected lora_A and lora_B, got one"),
        (_tensors(lambda t: t.update({f"{_Q}_A.weight": torch.full((3, 32), math.nan)})), "finite floating-point"),
        (_tensors(lambda t: t.update({f"{_Q}_A.weight": torch.zeros(3, 31)})), "expected a LoRA for K, N = "),
        (_tensors(lambda t: t.update({f"{_Q}_A.weight": torch.zeros(3)})), r"expected lora_A \[3, K\]"),
        (_tensors(lambda t: t.update({"../../x.lora_A.weight": torch.zeros(3, 3)})), "got the tensor ../../x.lora_A"),
        (_tensors(lambda t: t.update({f"{_Q}_magnitude_vector": torch.zeros(3)})), "magnitude_vector"),
        (
            _tensors(lambda t: t.update({f"base_model.model./etc/x.lora_{s}.weight": torch.zeros(3, 3) for s in "AB"})),
            "has no module /etc/x",
        ),
        (_tensors(lambda t: t.update({"base_model.model.no.such": torch.zeros(3)})), "no place for .*no.such"),
        (_tensors(lambda t: t.clear()), "must hold lora_A and lora_B"),
    ],
)
def test_hostile_files(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folders, _ = lora(CASES["llama"], tmp_path, target_modules=SQUARE["llama"])
    damage(folders.adapter)
    base = folders.load()
    with pytest.raises(ValueError, match=message):
        from_lora(base, folders.adapter, LoraXSConfig(r=64))
    assert not layers_of(base)
