"""PEFT's own TinyLoRA files, read and written: stock PEFT in the same process is the judge of both."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from peft import PeftModel, TinyLoraConfig, get_peft_model
from peft.tuners.tinylora import TinyLoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraxs_ext.checkpoint.tinylora as tinylora
import loraxs_ext.peft.bases as bases
from loraxs_ext.checkpoint.tinylora import load_tinylora, save_tinylora
from python_tests.peft.models import CASES, Case, layers_of, logits, train

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not", "ignore:fan_in_fan_out is set to False")

U, R = 5, 3
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request) -> Case:
    return request.param


@pytest.fixture
def llama() -> Case:
    return CASES["llama"]


def peft_model(case: Case, dtype: torch.dtype = torch.float32, **fields) -> PeftModel:
    """PEFT's TinyLoRA, clearly changing the model."""
    options = {"r": R, "u": U, "weight_tying": 0.5, "init_weights": "uniform", "init_v_bound": 1.0}
    targets = {"target_modules": list(case.targets), "task_type": case.task}
    return get_peft_model(case.base(dtype=dtype), TinyLoraConfig(**{**options, **targets, **fields})).eval()


def our_model(case: Case, **changes) -> PeftModel:
    tiny = {"use_tinylora": True, "u": U, "weight_tying": 0.5, "r": R, "lora_alpha": R, "sigma": "sqrt"}
    return case.model(**{**tiny, **changes})


def by_peft(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(PeftModel.from_pretrained(case.base(dtype=dtype), folder), case.inputs())


def same(actual: Tensor, expected: Tensor, tolerance: float = 5e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# There and back


@pytest.mark.parametrize(
    "weight_tying, save_projection", [(0.0, True), (0.5, False), (1.0, True)], ids=["untied", "P from its seed", "tied"]
)
def test_there_and_back(case: Case, weight_tying, save_projection, tmp_path, monkeypatch):
    theirs = peft_model(case, weight_tying=weight_tying, save_projection=save_projection)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, case.inputs())
    assert not torch.allclose(expected, logits(case.base(), case.inputs()), atol=1e-2)
    monkeypatch.setattr(bases.basis, "decompose", None)  # the file brings the bases

    ours = load_tinylora(case.base(), tmp_path / "theirs")
    same(logits(ours, case.inputs()), expected)
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    # The seed is enough for P.
    assert not ours.peft_config["default"].save_projection
    save_tinylora(ours, tmp_path / "back")
    assert torch.equal(by_peft(case, tmp_path / "back"), expected)
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(case.base(), tmp_path / "ours")
    assert torch.equal(logits(again, case.inputs()), logits(ours, case.inputs()))
    assert not any(name.endswith("projections") for name in load_file(tmp_path / "ours" / WEIGHTS))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("save_projection", [True, False], ids=["with P", "without P"])
def test_other_dtypes(llama: Case, dtype, tolerance, save_projection, tmp_path):
    theirs = peft_model(llama, dtype, save_projection=save_projection)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tinylora(llama.base(dtype=dtype), tmp_path / "theirs")
    same(logits(ours, llama.inputs()), logits(theirs, llama.inputs()), tolerance)
    # PEFT's P of a bf16 base is rounded, so that the seed is not enough.
    assert ours.peft_config["default"].save_projection == (dtype == torch.bfloat16)
    save_tinylora(ours, tmp_path / "back")
    assert torch.equal(by_peft(llama, tmp_path / "back", dtype), logits(theirs, llama.inputs()))


def test_projections_that_no_seed_gives_are_kept(llama: Case, tmp_path):
    theirs = peft_model(llama)
    for module in theirs.modules():
        if isinstance(module, TinyLoraLayer):
            module.tinylora_P["default"].mul_(2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tinylora(llama.base(), tmp_path / "theirs")
    same(logits(ours, llama.inputs()), logits(theirs, llama.inputs()))
    assert ours.peft_config["default"].save_projection
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(llama.base(), tmp_path / "ours")
    assert torch.equal(logits(again, llama.inputs()), logits(ours, llama.inputs()))


@pytest.mark.parametrize(
    "changes",
    [
        {"sigma": "A"},
        {"lora_alpha": 7.5, "alpha_pattern": {"v_proj": 2}},
        {"rank_pattern": {"q_proj": 2}, "u": 1, "weight_tying": 1.0},
        {"r": 40, "lora_alpha": 40},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
        {"target_modules": r".*\.layers\.1\..*_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_ours_for_peft(llama: Case, changes, tmp_path):
    ours = our_model(llama, **changes)
    train(ours, llama)
    save_tinylora(ours, tmp_path / "theirs")
    expected = logits(ours, llama.inputs())
    same(by_peft(llama, tmp_path / "theirs"), expected, 1e-5)
    same(logits(load_tinylora(llama.base(), tmp_path / "theirs"), llama.inputs()), expected, 1e-5)


def test_the_written_file_is_what_peft_writes(llama: Case, tmp_path):
    theirs = peft_model(llama)
    theirs.save_pretrained(tmp_path / "theirs")
    save_tinylora(load_tinylora(llama.base(), tmp_path / "theirs"), tmp_path / "back")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    first, second = (TinyLoraConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "back"))
    differing = {name for name in first if first[name] != second[name]}
    assert differing <= {"init_weights"}


@pytest.mark.parametrize("bias", ["none", "all", "tinylora_only"])
def test_heads_and_biases(bias, tmp_path):
    bert = CASES["bert"]
    theirs = peft_model(bert, bias=bias)
    train(theirs, bert)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tinylora(bert.base(), tmp_path / "theirs")
    same(logits(ours, bert.inputs()), logits(theirs, bert.inputs()))
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(logits(ours, bert.inputs()), logits(theirs, bert.inputs()))
    save_tinylora(ours, tmp_path / "back")
    assert torch.equal(by_peft(bert, tmp_path / "back"), logits(theirs, bert.inputs()))


def test_a_loaded_adapter_can_be_trained_on(llama: Case, tmp_path):
    theirs = peft_model(llama)
    theirs.save_pretrained(tmp_path)
    ours = load_tinylora(llama.base(), tmp_path, is_trainable=True)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    train(ours, llama)
    train(theirs, llama)
    same(logits(ours, llama.inputs()), logits(theirs, llama.inputs()), 1e-4)


@pytest.mark.parametrize("sigma", ["A", "sqrt"])
def test_it_joins_other_adapters_on_their_basis(llama: Case, sigma, tmp_path):
    theirs = peft_model(llama)
    theirs.save_pretrained(tmp_path)
    model = llama.model(r=4, sigma=sigma)
    before = logits(model, llama.inputs())
    assert load_tinylora(model, tmp_path, "tiny") is model
    assert torch.equal(logits(model, llama.inputs()), before)
    rows = logits(model, llama.inputs(3), adapter_names=["tiny", "default", "__base__"])
    base = llama.base()
    for row, alone in enumerate((theirs, model, base)):
        single = {name: value[row : row + 1] for name, value in llama.inputs(3).items()}
        same(rows[row : row + 1], logits(alone, single), 1e-4)


# What is refused, and what that leaves behind


@pytest.fixture
def folder(llama: Case, tmp_path) -> Path:
    peft_model(llama).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def edit_config(folder: Path, **changes) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def expect_refusal(case: Case, folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    base = case.base()
    with pytest.raises(error, match=message):
        load_tinylora(base, folder)
    assert not layers_of(base) and torch.equal(logits(base, case.inputs()), logits(case.base(), case.inputs()))
    model = case.model(sigma="sqrt")
    before = logits(model, case.inputs())
    with pytest.raises(error, match=message):
        load_tinylora(model, folder, "tiny")
    assert set(model.peft_config) == {"default"}
    assert torch.equal(logits(model, case.inputs()), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LORA"}, "peft_type: expected 'TINYLORA', got 'LORA'"),
        ({"r": "3"}, "r: expected int, got '3'"),
        ({"r": True}, "r: expected int, got True"),
        ({"u": 4}, r"tinylora_v.0: expected floating-point numbers of shape \[4\], got F32 of shape \[5\]"),
        ({"r": 4}, r"tinylora_A: expected floating-point numbers of shape \[4, 48\]"),
        ({"r": 10**12, "u": 10**12}, r"tinylora_A: expected floating-point numbers of shape \[32, 48\]"),
        ({"u": 10**12}, r"tinylora_v.0: expected floating-point numbers of shape \[1000000000000\]"),
        ({"weight_tying": 2.0}, "weight_tying: expected a ratio"),
        ({"weight_tying": 0.0}, "expected a tensor base_model.tinylora_v.3, got none"),
        ({"weight_tying": 1.0}, "got base_model.tinylora_v.1 too"),
        ({"target_modules": ["q_proj"], "weight_tying": 0.0}, r"of 2 modules of the model, got .*tinylora_A too"),
        ({"target_modules": None}, "target_modules: expected list or str, got None"),
        ({"bias": "lora_only"}, "bias: expected one of"),
        ({"tinylora_dropout": "no"}, "tinylora_dropout: expected a number, got 'no'"),
        ({"modules_to_save": ["lm_head"]}, "expected the heads and biases of the model, got: .*lm_head"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit(llama: Case, folder, changes, message):
    edit_config(folder, **changes)
    expect_refusal(llama, folder, message)


def test_embeddings(llama: Case, tmp_path):
    theirs = peft_model(llama, target_modules=["embed_tokens", "q_proj"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tinylora(llama.base(), tmp_path / "theirs")
    same(logits(ours, llama.inputs()), logits(theirs, llama.inputs()))
    save_tinylora(ours, tmp_path / "back")
    same(by_peft(llama, tmp_path / "back"), logits(theirs, llama.inputs()))


def test_other_modules(llama: Case, folder):
    edit_config(folder, target_modules=["input_layernorm", "q_proj"])
    expect_refusal(llama, folder, "expected a linear layer", TypeError)


A = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_A"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(A), f"expected a tensor {A}, got none"),
        (lambda t: t.update({A: t[A][:, :-1].clone()}), r"shape \[3, 32\], got F32 of shape \[3, 31\]"),
        (lambda t: t.update({A: t[A].int()}), "got I32"),
        (lambda t: t[A].fill_(torch.inf), "expected finite numbers, got NaN or Inf"),
        (lambda t: t.pop(A.replace("_A", "_P")), "tinylora_P, got none"),
    ],
    ids=["missing", "shape", "type", "infinite", "some P"],
)
def test_tensors_that_do_not_fit(llama: Case, folder, change, message):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    expect_refusal(llama, folder, message)


def test_damaged_files(llama: Case, folder):
    whole = (folder / WEIGHTS).read_bytes()
    header = json.dumps({A: {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 8]}}).encode()
    for damaged in (whole[:-1], b"", struct.pack("<Q", len(header)) + header + bytes(8)):
        (folder / WEIGHTS).write_bytes(damaged)
        expect_refusal(llama, folder, "expected a whole safetensors file")
    for damaged in ("{", "[1]", "[" * 10**5):
        (folder / CONFIG).write_text(damaged)
        expect_refusal(llama, folder, "expected a JSON object")


def test_pickled_weights_are_not_read(llama: Case, folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    expect_refusal(llama, folder, "expected a safetensors file, got none", FileNotFoundError)


def test_names_and_models_that_are_taken(llama: Case, folder):
    with pytest.raises(ValueError, match="adapter_name: expected a new name, got 'default', which exists"):
        load_tinylora(llama.model(), folder)
    with pytest.raises(ValueError, match="already adapted"):
        load_tinylora(llama.model().base_model.model, folder)


def test_only_tinylora_can_be_written(llama: Case, tmp_path):
    for model, name in ((llama.model(), "default"), (our_model(llama), "nobody")):
        with pytest.raises(ValueError, match="adapter_name: expected an adapter with use_tinylora=True"):
            save_tinylora(model, tmp_path / "out", name)
    with pytest.raises(ValueError, match=r"trainable_token_indices: expected None, got \[3\]"):
        save_tinylora(our_model(llama, trainable_token_indices=[3]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_the_old_file(llama: Case, tmp_path, monkeypatch):
    model = our_model(llama)
    save_tinylora(model, tmp_path / "saved")
    expected = logits(model, llama.inputs())
    for core in (layer.core("default") for layer in layers_of(model)):
        core.vector.data.zero_()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tinylora, "save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            save_tinylora(model, tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {WEIGHTS, CONFIG}
    same(by_peft(llama, tmp_path / "saved"), expected)
    save_tinylora(model, tmp_path / "saved")
    same(by_peft(llama, tmp_path / "saved"), logits(llama.base(), llama.inputs()))
