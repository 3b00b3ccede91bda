"""What is in a file, and what happens when it meets a base model."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

import loraxs_ext.peft.bases as bases

from .models import CASES, Case, layers_of, logits, train

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def saved(llama: Case, tmp_path):
    """A trained adapter on disk, and its logits."""
    model = llama.model()
    train(model, llama)
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model, llama.inputs())


def rounded(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The same model with weights that went through `dtype`."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    return model


def flipped(monkeypatch) -> None:
    """From now on every second singular vector has the other sign, as another SVD may give it."""
    decompose = bases.basis.decompose

    def decompose_flipped(*args, **kwargs):
        result = decompose(*args, **kwargs)
        for key, factors in result.items():
            signs = torch.ones(len(factors.a), 1)
            signs[::2] = -1
            result[key] = factors._replace(a=factors.a * signs, bt=factors.bt * signs)
        return result

    monkeypatch.setattr(bases.basis, "decompose", decompose_flipped)


# Every way a file gets into a model


def by_peft(case, base, path):
    return PeftModel.from_pretrained(base, path)


def by_peft_trainable(case, base, path):
    model = PeftModel.from_pretrained(base, path, is_trainable=True)
    model(**case.inputs())
    return model.eval()


def by_peft_low_memory(case, base, path):
    return PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)


def by_transformers(case, base, path):
    base.load_adapter(str(path))
    return base


def by_state_dict(case, base, path):
    model = get_peft_model(base, case.config())
    tensors = load_file(path / "adapter_model.safetensors")
    renamed = {k.replace("loraxs_R.", "loraxs_R.default."): v for k, v in tensors.items()}
    assert not model.load_state_dict(renamed, strict=False).unexpected_keys
    return model.eval()


def by_set_peft_model_state_dict(case, base, path):
    model = get_peft_model(base, case.config())
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    return model.eval()


def by_hotswap(case, base, path):
    model = get_peft_model(base, case.config()).eval()
    hotswap_adapter(model, str(path), "default", torch_device="cpu")
    return model


ROUTES = [
    by_peft,
    by_peft_trainable,
    by_peft_low_memory,
    by_transformers,
    by_state_dict,
    by_set_peft_model_state_dict,
    by_hotswap,
]
every_route = pytest.mark.parametrize("load", ROUTES, ids=lambda f: f.__name__)


@every_route
def test_same_base_gives_the_same_logits(llama: Case, saved, load):
    path, expected = saved
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA-XS")
        assert torch.equal(logits(load(llama, llama.base(), path), llama.inputs()), expected)


@every_route
def test_wrong_base_is_refused_with_numbers(llama: Case, saved, load):
    message = r"another base model.* of 6 of 6 modules .*worst module model\.layers\.\d.*: error 1?\.?\d+.*up to 0.1\)"
    with pytest.raises(ValueError, match=message):
        logits(load(llama, llama.base(seed=1), saved[0]), llama.inputs())


@every_route
def test_flipped_signs_are_fixed(llama: Case, saved, load, monkeypatch):
    path, expected = saved
    flipped(monkeypatch)
    model = load(llama, llama.base(), path)
    torch.testing.assert_close(logits(model, llama.inputs()), expected, rtol=1e-5, atol=1e-5)


@every_route
def test_another_precision_of_the_same_base_warns(llama: Case, saved, load):
    path, expected = saved
    with pytest.warns(UserWarning, match=r"differ slightly .*worst module .*error 0\.0\d+"):
        model = load(llama, rounded(llama.base()), path)
        loaded = logits(model, llama.inputs())
    assert 0 < (loaded - expected).abs().max() < 0.1


@pytest.mark.parametrize("bits, refused", [(8, False), (2, True)])
def test_coarse_quantisation_is_refused(llama: Case, saved, bits, refused):
    base = llama.base()
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "proj" in name:
                step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                weight.copy_((weight / step).round() * step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if refused:
            with pytest.raises(ValueError, match="another base model, revision or quantisation"):
                PeftModel.from_pretrained(base, saved[0])
        else:
            PeftModel.from_pretrained(base, saved[0])


@every_route
def test_a_damaged_sketch_is_refused(llama: Case, saved, load):
    file = saved[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("q_proj.loraxs_R.sketch"))
    tensors[key][:, 1] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match="another base model.* singular vectors of 1 of"):
        logits(load(llama, llama.base(), saved[0]), llama.inputs())


def edit_config(path: Path, **changes) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_check_can_be_lowered(llama: Case, saved):
    path, _ = saved
    edit_config(path, basis_check="warn")
    with pytest.warns(UserWarning, match="was trained on another base model") as caught:
        PeftModel.from_pretrained(llama.base(seed=1), path)
    assert sum("was trained on another base model" in str(w.message) for w in caught) == 1
    edit_config(path, basis_check="ignore")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA-XS")
        PeftModel.from_pretrained(llama.base(seed=1), path)
    edit_config(path, basis_check="error", basis_tol=5.0)
    with pytest.warns(UserWarning, match="differ slightly"):
        PeftModel.from_pretrained(llama.base(seed=1), path)


def test_a_refused_adapter_changes_nothing_that_is_loaded(llama: Case, saved):
    model = llama.model(seed=1)
    before = logits(model, llama.inputs())
    with pytest.raises(ValueError, match="another base model"):
        model.load_adapter(saved[0], "wrong")
    assert torch.equal(logits(model.eval(), llama.inputs()), before)
    core = layers_of(model)[0].loraxs_R["wrong"]
    assert not torch.equal(core.weight, load_file(saved[0] / "adapter_model.safetensors")[_r_key(model)])


def _r_key(model) -> str:
    return f"base_model.model.{layers_of(model)[0].key}.loraxs_R.weight"


def test_settling_at_the_first_forward_pass_is_exact_and_leaves_trainable_tensors(llama: Case, saved):
    """Autocast would round the comparison, and tensors made in inference mode could never be trained with."""
    path, expected = saved
    model = llama.base()
    model.load_adapter(str(path), is_trainable=True)
    assert not any(layer.core("default").settled for layer in layers_of(model))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA-XS")
        model(**llama.inputs())
    assert torch.equal(logits(model, llama.inputs()), expected)
    train(model, llama)


# The file


def test_file_holds_r_and_sketches_only(case: Case, tmp_path):
    model = case.model(r=5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    modules = len(layers_of(model))
    ours = {k: v for k, v in tensors.items() if "loraxs_" in k}
    assert {k.rpartition("loraxs_R.")[2] for k in ours} == {"weight", "sketch"} and len(ours) == 2 * modules
    head = sum(4 * v.numel() for k, v in tensors.items() if k not in ours)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "adapter_model.safetensors").read_bytes()[:8], "little") + 8
    assert size - header - head == modules * (4 * 25 + 4 * 5 * 5) <= modules * (4 * 25 + 6 * 4 * 5)


def test_config_is_plain_json_with_recipe_and_fingerprint(llama: Case, saved, tmp_path):
    config = json.loads((saved[0] / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORAXS" and config["sigma"] == "A" and config["svd_tol"] == 1e-3
    assert int(config["base_fingerprint"], 16) < 2**64 and len(config["base_fingerprint"]) == 16
    same, other = llama.model(init_seed=5), llama.model(seed=1)
    same.merge_adapter()
    for model, expected in ((same, True), (other, False)):
        model.save_pretrained(tmp_path / "again")
        assert (model.peft_config["default"].base_fingerprint == config["base_fingerprint"]) == expected


def test_saving_again_gives_the_same_file(llama: Case, saved, tmp_path):
    loaded = PeftModel.from_pretrained(llama.base(), saved[0])
    loaded.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (saved[0] / name).read_bytes()


SCRIPT = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
import loraxs_ext.peft
from python_tests.peft.models import CASES, logits
for name, case in CASES.items():
    path = Path(sys.argv[1]) / name
    torch.save(logits(PeftModel.from_pretrained(case.base(), path), case.inputs()), path / "logits.pt")
"""


def test_fresh_process_gives_the_same_logits(tmp_path, monkeypatch):
    expected = {}
    for name, case in CASES.items():
        model = case.model()
        train(model, case)
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model, case.inputs())
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "another cache"))
    arguments = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)]
    subprocess.run(arguments, check=True, cwd=REPOSITORY, capture_output=True)
    for name in CASES:
        torch.testing.assert_close(torch.load(tmp_path / name / "logits.pt"), expected[name], rtol=0, atol=1e-6)


# Self-contained files


@pytest.fixture
def complete(llama: Case, tmp_path):
    """An adapter saved with its basis."""
    model = llama.model(save_basis=True)
    train(model, llama)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def deltas(model) -> list[torch.Tensor]:
    return [layer.get_delta_weight("default") for layer in layers_of(model)]


@pytest.mark.parametrize("load", [by_peft, by_peft_trainable, by_peft_low_memory, by_transformers])
def test_self_contained_file_fits_any_copy_without_an_svd(llama: Case, complete, load, monkeypatch):
    path, model = complete
    monkeypatch.setattr(bases.basis, "decompose", None)
    same = load(llama, llama.base(), path)
    assert torch.equal(logits(same, llama.inputs()), logits(model, llama.inputs()))
    for base in (rounded(llama.base()), llama.base(seed=1)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="LoRA-XS")
            other = load(llama, base, path)
            assert all(torch.equal(a, b) for a, b in zip(deltas(other), deltas(model), strict=True))
    half = load(llama, llama.base(dtype=torch.bfloat16), path)
    for a, b in zip(deltas(half), deltas(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("load", [by_set_peft_model_state_dict, by_state_dict, by_hotswap])
def test_self_contained_file_replaces_the_basis_of_a_fresh_adapter(llama: Case, complete, load, monkeypatch):
    path, model = complete
    monkeypatch.setattr(llama.__class__, "config", lambda self, **k: CONFIG(self, save_basis=True, **k))
    other = load(llama, llama.base(seed=1), path)
    logits(other, llama.inputs())
    assert all(torch.equal(a, b) for a, b in zip(deltas(other), deltas(model), strict=True))


CONFIG = Case.config


def test_beside_another_adapter_r_is_moved_to_the_common_basis(llama: Case, complete):
    path, model = complete
    other = llama.model(r=12)
    before = logits(other, llama.inputs())
    other.load_adapter(path, "complete")
    assert torch.equal(logits(other, llama.inputs()), before)
    other.set_adapter("complete")
    torch.testing.assert_close(logits(other, llama.inputs()), logits(model, llama.inputs()), rtol=1e-4, atol=1e-4)


def test_beside_another_adapter_of_another_base_it_is_refused(llama: Case, complete):
    other = llama.model(seed=1)
    before = logits(other, llama.inputs())
    with pytest.raises(ValueError, match="another base model"):
        other.load_adapter(complete[0], "complete")
    other.delete_adapter("complete")
    assert torch.equal(logits(other.eval(), llama.inputs()), before)


def test_an_adapter_may_be_added_to_a_self_contained_one(llama: Case, complete):
    path, model = complete
    loaded = PeftModel.from_pretrained(llama.base(), path)
    loaded.add_adapter("wide", llama.config(r=7))
    assert torch.equal(logits(loaded, llama.inputs()), logits(model, llama.inputs()))
    assert layers_of(loaded)[0].basis_rank == 7


@pytest.mark.parametrize("leaf, shape", [("a", (4, 31)), ("bt", (3, 32)), ("weight", (5, 5)), ("sketch", (4, 4))])
def test_wrong_shapes_are_refused(llama: Case, complete, leaf, shape):
    path, _ = complete
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith(f"q_proj.loraxs_R.{leaf}"))
    save_file({**tensors, key: torch.zeros(shape)}, file)
    with pytest.raises(RuntimeError, match=rf"size mismatch for .*q_proj\.loraxs_R\.default\.{leaf}"):
        PeftModel.from_pretrained(llama.base(), path)


def test_a_broken_basis_in_a_file_is_not_used(llama: Case, complete):
    path, model = complete
    file = path / "adapter_model.safetensors"
    tensors = {k: v.fill_(torch.inf) if k.endswith(".a") else v for k, v in load_file(file).items()}
    save_file(tensors, file)
    loaded = PeftModel.from_pretrained(llama.base(), path)
    torch.testing.assert_close(logits(loaded, llama.inputs()), logits(model, llama.inputs()), rtol=1e-5, atol=1e-5)
