"""The Python of README and guides that no other test runs, as printed, on small models in place of those named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TinyLoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from loraxs_ext import LoraXSConfig, cli
from python_tests.checkpoint import reference_format
from python_tests.training.tiny import save_llama

ROOT = Path(__file__).parents[1]
IDS = torch.tensor([[2, 7, 8], [2, 9, 10], [2, 11, 12]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def llama(tmp_path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(save_llama(tmp_path / "llama"))


@pytest.fixture
def adapters(llama) -> None:
    """A store STORE with alice, bob and team/carol, adapters of that model."""
    pytest.importorskip("lmdb")
    config = LoraXSConfig(r=4, target_modules="all-linear", init_std=0.5, task_type="CAUSAL_LM")
    for seed, name in enumerate(("alice", "bob", "team/carol")):
        config.init_seed = seed
        model = get_peft_model(llama, config)
        model.save_pretrained(f"users/{name}")
        model.unload()
    assert cli.main(["pack", "STORE", "users"]) == 0


def blocks(name: str, heading: str = "") -> list[str]:
    """The Python of one section, or of the whole document."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if heading:
        text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(block: str, **scope: Any) -> dict[str, Any]:
    exec(block, scope)
    return scope


def test_a_pool(llama, adapters):
    (block,) = blocks("README.md", "Serving any number of adapters")
    block = block.replace("    model.generate(", "    tokens = model.generate(")
    found = run(block, model=llama, tokenizer=AutoTokenizer.from_pretrained("llama"))
    assert found["pool"].stats()["misses"] == 2
    plain = llama.generate(**found["inputs"], max_new_tokens=32)
    width = min(found["tokens"].shape[1], plain.shape[1])
    same = (found["tokens"][:, :width] == plain[:, :width]).all(dim=1).tolist()
    assert same == [False, True, False]  # as the names say
    found["pool"].close()
    found["store"].close()


def test_many_adapters(llama):
    (block,) = blocks("README.md", "Training many adapters, and on many processes")
    config = LoraXSConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    found = run(block, model=llama, config=config, inputs=INPUTS, labels=IDS, get_peft_model=get_peft_model)
    trained = found["many"].rows.detach().abs().amax(dim=1)
    assert trained.isfinite().all() and trained[0] > trained[2]  # ann had a row, cat had none


def test_a_store(adapters):
    (block,) = blocks("docs/store.md")
    found = run(block)
    assert found["row"].name == "alice" and len(found["row"].numbers) == found["row"].layout.size


def test_coming_from_the_reference(tmp_path):
    pytest.importorskip("sklearn")
    script, checkpoint = blocks("docs/interchange.md", "Coming from the LoRA-XS or EDoRA code")
    options = {**reference_format.RECONSTRUCTION, "svd": {**reference_format.RECONSTRUCTION["svd"], "rank": 16}}
    found = run(
        script, model=reference_format.roberta(), LoraConfig=LoraConfig, get_peft_model=get_peft_model,
        reconstruct_config=options,
    )  # fmt: skip
    assert found["model"].active_peft_config.peft_type == "LORAXS"
    trained = reference_format.train(reference_format.roberta())
    reference_format.write(tmp_path / "folder", trained).rename(tmp_path / "folder" / "checkpoint-500")
    model = run(checkpoint, base=reference_format.roberta())["model"]
    with torch.no_grad():
        logits = model(**reference_format.inputs()).logits
    expected = reference_format.forward(reference_format.roberta(), trained)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_relatives(llama, tmp_path):
    edora, tinylora = blocks("docs/relatives.md")
    config = run(edora, LoraXSConfig=LoraXSConfig)["config"]
    config.task_type = "CAUSAL_LM"
    get_peft_model(llama, config).unload()
    theirs = TinyLoraConfig(r=2, u=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(llama, theirs).eval()
    expected = model(**INPUTS).logits.detach()
    model.save_pretrained("saved-by-peft")
    base = model.unload()
    found = run(tinylora, base=base)
    torch.testing.assert_close(found["model"].eval()(**INPUTS).logits.detach(), expected, rtol=1e-4, atol=1e-4)
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "llama"), "for-peft").eval()
    torch.testing.assert_close(again(**INPUTS).logits.detach(), expected, rtol=1e-4, atol=1e-4)


def test_advice(llama, capsys):
    (block,) = blocks("docs/training.md", "Which rank where?")
    batches = [{**INPUTS, "labels": IDS}] * 2
    block = block.replace("budget=9216", "budget=200")
    found = run(block, model=llama, batches=batches, LoraXSConfig=LoraXSConfig)
    assert isinstance(found["config"], LoraXSConfig) and "keep uniform" in capsys.readouterr().out
