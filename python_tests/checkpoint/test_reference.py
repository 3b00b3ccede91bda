"""An imported checkpoint of the LoRA-XS or EDoRA code gives the logits it was trained for, or is refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from loraxs_ext import load_reference
from loraxs_ext.layers import LoraXSLayer

from .reference_format import Trained, forward, inputs, roberta, train, write

sklearn = pytest.importorskip("sklearn", reason="scikit-learn makes the bases of the reference")
SIGNS = "columns of B" if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 5) else "rows of A"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path_factory.mktemp("bases")))


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(roberta())


def logits(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(), **kwargs).logits


def layers_of(model: torch.nn.Module) -> list[LoraXSLayer]:
    return [module for module in model.modules() if isinstance(module, LoraXSLayer)]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


def reloaded(model: PeftModel, folder: Path) -> torch.Tensor:
    """Logits after our own save and PEFT's load."""
    model.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(roberta(), folder))


# The reference's logits


@pytest.mark.parametrize("spelling", ["peft 0.17", "peft 0.18"])
def test_logits_are_the_reference_s(trained: Trained, tmp_path, spelling: str) -> None:
    expected = forward(roberta(), trained)
    assert float((expected - logits(roberta())).norm() / expected.norm()) > 0.1
    model = load_reference(roberta(), write(tmp_path, trained, spelling=spelling))
    close(logits(model), expected)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for layer in layers_of(model):
        found = trained.parts[layer.key]
        assert torch.equal(layer.get_R("default"), found["R"])
        assert torch.equal(layer.get_basis("default")[0], found["A"])
        assert torch.equal(layer.get_basis("default")[1], found["B"])


def test_saved_again_it_is_small(trained: Trained, tmp_path) -> None:
    checkpoint = write(tmp_path, trained)
    model = load_reference(roberta(), checkpoint)
    close(reloaded(model, tmp_path / "ours"), forward(roberta(), trained), 1e-3)
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    adapter = {name: tensor for name, tensor in saved.items() if "classifier" not in name}
    assert {name.rsplit(".", 1)[1] for name in adapter} == {"weight", "sketch"}
    assert sum(t.numel() for t in adapter.values()) == len(trained.parts) * (4 * 4 + 5 * 4)


@pytest.mark.parametrize("adapter", ["default", "mnli"])
def test_merged_it_is_the_same(trained: Trained, tmp_path, adapter: str) -> None:
    """The reference's own merge script loses R of newer files, and the head's output."""
    model = load_reference(roberta(), write(tmp_path, trained), adapter)
    close(logits(model.merge_and_unload()), forward(roberta(), trained))


def test_stock_peft_drops_the_core(trained: Trained, tmp_path) -> None:
    """Why this module exists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = logits(PeftModel.from_pretrained(roberta(), write(tmp_path, trained)))
    expected = forward(roberta(), trained)
    assert float((stock - expected).norm() / expected.norm()) > 0.05


def test_without_a_and_b(trained: Trained, tmp_path) -> None:
    checkpoint = write(tmp_path, trained, basis=False)
    close(logits(load_reference(roberta(), checkpoint, sklearn_signs=SIGNS)), forward(roberta(), trained), 1e-3)
    # The rule is a choice only the user can make: the other one is another adapter, unless R is diagonal.
    wrong = "rows of A" if SIGNS == "columns of B" else "columns of B"
    other = logits(load_reference(roberta(), checkpoint, sklearn_signs=wrong))
    assert float((other - forward(roberta(), trained)).norm() / other.norm()) > 0.05


@pytest.mark.parametrize("where", ["parent", "beside"])
def test_iterations_are_those_of_its_reconstruction(trained: Trained, tmp_path, where: str) -> None:
    svd = {"n_iter": 2, "random_state": 7, "rank": 4}
    checkpoint = write(tmp_path, trained, reconstruction={"svd": svd}, where=where, basis=False)
    recipe = load_reference(roberta(), checkpoint).peft_config["default"].recipe()
    assert (recipe.sklearn_n_iter, recipe.sklearn_random_state) == (2, 7)


@pytest.mark.parametrize("told", [None, {"replacement_module_random_init": True}], ids=["untold", "told"])
def test_a_basis_drawn_at_random_stays_in_the_file(trained: Trained, tmp_path, told: dict | None) -> None:
    drawn = trained.drawn()
    with pytest.warns(UserWarning, match="its basis cannot be computed again .* so A and B stay in its files"):
        model = load_reference(roberta(), write(tmp_path, drawn, reconstruction=told))
    close(logits(model), forward(roberta(), drawn))
    close(reloaded(model, tmp_path / "ours"), forward(roberta(), drawn))


def test_edora(trained: Trained, tmp_path) -> None:
    """Its own disable_adapter is ignored, merging counts twice, and its merge script loses the magnitudes."""
    edora = trained.with_magnitudes(roberta())
    expected, base = forward(roberta(), edora), logits(roberta())
    assert float((expected - forward(roberta(), trained)).norm() / expected.norm()) > 0.05
    spellings = {"0.10": lambda name: name, "newer": lambda name: name.replace("_vector", "_vector.weight")}
    for version, rename in spellings.items():
        model = load_reference(roberta(), write(tmp_path / version, edora, use_dora=True, rename=rename))
        close(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    model.merge_adapter()
    close(logits(model), expected)
    model.unmerge_adapter()
    close(reloaded(model, tmp_path / "ours"), expected, 1e-3)


def test_head_in_other_spellings(trained: Trained, tmp_path) -> None:
    for number, part in enumerate((".modules_to_save", ".modules_to_save.default")):
        folder = tmp_path / str(number)
        checkpoint = write(folder, trained, rename=lambda n, part=part: n.replace("classifier", f"classifier{part}"))
        close(logits(load_reference(roberta(), checkpoint)), forward(roberta(), trained))


def test_continuing_with_another_head(trained: Trained, tmp_path) -> None:
    """From MNLI to a task of three classes: the reference loses classifier.dense on the way."""
    checkpoint = write(tmp_path, trained)
    with pytest.raises(ValueError, match=r"classifier.out_proj.*: expected shape \[3.*got \[2.*ignore_mismatched_size"):
        load_reference(roberta(labels=3), checkpoint)
    base = roberta(labels=3)
    own = base.classifier.out_proj.weight.detach().clone()
    with pytest.warns(UserWarning, match="out_proj.weight: found shape"):
        model = load_reference(base, checkpoint, is_trainable=True, ignore_mismatched_sizes=True)
    head = model.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(head.dense.weight, trained.head["classifier.dense.weight"])
    assert torch.equal(head.out_proj.weight, own)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(trained.parts) + 4
    assert all("loraxs_R" in name or "classifier.modules_to_save" in name for name in trainable)


def test_many_in_one_model(trained: Trained, tmp_path) -> None:
    """Bases of one recipe are one basis: a second checkpoint joins the first."""
    other = Trained({key: {**found, "R": -found["R"]} for key, found in trained.parts.items()}, trained.head)
    model = load_reference(roberta(), write(tmp_path / "one", trained), "one")
    assert load_reference(model, write(tmp_path / "two", other), "two") is model
    close(logits(model), forward(roberta(), trained))
    model.set_adapter("two")
    close(logits(model), forward(roberta(), other), 1e-4)


# What is refused


def test_another_base_model_is_refused(trained: Trained, tmp_path) -> None:
    checkpoint, base = write(tmp_path, trained), roberta(seed=1)
    expected = logits(base)
    with pytest.raises(ValueError, match="was trained on another base model, revision or quantisation"):
        load_reference(base, checkpoint)
    # It is as it was, and takes the checkpoint if that is insisted on.
    assert not layers_of(base) and torch.equal(logits(base), expected)
    with pytest.warns(UserWarning, match="was trained on another base model"):
        close(logits(load_reference(base, checkpoint, basis_check="warn")), forward(roberta(seed=1), trained))


def test_a_refused_checkpoint_leaves_the_other_adapters(trained: Trained, tmp_path) -> None:
    model = load_reference(roberta(), write(tmp_path / "good", trained), "good")
    bad = write(tmp_path / "bad", trained, rename=lambda name: None if "out_proj" in name else name)
    with pytest.raises(ValueError, match="missing .*classifier.out_proj.bias"):
        load_reference(model, bad, "bad")
    assert list(model.peft_config) == ["good"]
    close(logits(model), forward(roberta(), trained))


QUERY = "roberta.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("rename", "config", "message"),
    [
        (lambda n: f"{n}.more" if "R_" in n else n.replace("lora_A", "lora_X"), {}, "missing .*'A'"),
        (lambda n: None if f"{QUERY}.default" in n else n, {}, f"{QUERY}: expected .* missing \\['R'\\]"),
        (lambda n: None if QUERY in n else n, {}, f"missing \\['{QUERY}'\\], unexpected \\[\\]"),
        (lambda n: n.replace("layer.1", "layer.7"), {}, "unexpected .*layer.7"),
        (lambda n: n.replace("classifier.dense", "classifier.extra"), {}, "unexpected .*classifier.extra.bias"),
        (lambda n: n.removeprefix("base_model."), {}, "expected floating-point tensors named base_model.model.…"),
        (lambda n: None if "latent" in n else n, {}, "expected an R in every adapted module, got none"),
        (None, {"use_dora": True}, "missing \\['m'\\]"),
        (None, {"r": 8}, r"expected R \[8, 8\], as the configuration and the model have it, got \[4, 4\]"),
        (None, {"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        (None, {"layer_replication": [[0, 1]]}, "without a counterpart .*layer_replication"),
        (None, {"r": "four"}, "r: expected an int, got 'four'"),
    ],
)
def test_what_does_not_fit_is_named(trained: Trained, tmp_path, rename, config: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        load_reference(roberta(), write(tmp_path, trained, rename=rename, **config))


def test_magnitudes_without_dora_are_unexpected(trained: Trained, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"unexpected \['m'\]"):
        load_reference(roberta(), write(tmp_path, trained.with_magnitudes(roberta())))


def test_lora_of_the_reference_is_sent_to_peft(trained: Trained, tmp_path) -> None:
    with pytest.raises(ValueError, match="r_squared=False is plain LoRA, which PeftModel.from_pretrained loads"):
        load_reference(roberta(), write(tmp_path, trained, reconstruction={"r_squared": False}))


def test_numbers_must_be_finite_and_shapes_fit(trained: Trained, tmp_path) -> None:
    (key, found), *rest = trained.parts.items()
    for number, (core, message) in enumerate(
        [
            (found["R"] / 0, f"{key}.*expected finite numbers"),
            (found["R"][:3], f"{key}: expected R"),
            (found["R"][0], f"{key}: expected R"),
            (found["R"].long(), f"{key}.* of torch.int64"),
        ]
    ):
        broken = Trained({key: {**found, "R": core}, **dict(rest)}, trained.head)
        with pytest.raises(ValueError, match=message):
            load_reference(roberta(), write(tmp_path / str(number), broken))


def test_files_are_not_trusted(trained: Trained, tmp_path) -> None:
    checkpoint = write(tmp_path, trained, reconstruction={})
    reconstruction = tmp_path / "reconstr_config.json"
    reconstruction.write_text(json.dumps({"svd": {"n_iter": "ten"}}))
    with pytest.raises(ValueError, match=r"reconstr_config.json\['svd'\]\['n_iter'\]: expected a whole number"):
        load_reference(roberta(), checkpoint)
    reconstruction.write_text("[" * 10000)
    with pytest.raises(ValueError, match="reconstr_config.json: expected a JSON object"):
        load_reference(roberta(), checkpoint)
    reconstruction.unlink()
    tensors = checkpoint / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(ValueError, match="adapter_model.safetensors: expected a safetensors file"):
        load_reference(roberta(), checkpoint)
    tensors.rename(checkpoint / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled files are not read. If you trust it: safetensors.torch.save_file"):
        load_reference(roberta(), checkpoint)
    (checkpoint / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        load_reference(roberta(), checkpoint)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json"):
        load_reference(roberta(), tmp_path / "nowhere")
