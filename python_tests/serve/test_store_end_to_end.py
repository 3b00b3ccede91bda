"""From trained adapters in a store on disk to tokens, and the guide that says how."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import loraxs_ext
from loraxs_ext.cli import main
from loraxs_ext.store import AdapterRow, AdapterStore, Manifest, in_dtype

from ..peft.models import CASES, VOCABULARY, logits
from .scenes import NAMES, Scene
from .sources import Shelf, row_of

pytest.importorskip("lmdb")
GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"


def stored(shelf: Shelf, folder: Path) -> Path:
    """A store with the adapters of a shelf, and nothing said of the base but the sketches of its basis."""
    about = shelf.manifest
    manifest = Manifest(about.fingerprint, about.recipe, about.config, about.sketches)
    with AdapterStore.create(folder, manifest) as store:
        store.put_many(shelf.rows.values())
    return folder


@pytest.fixture
def store(llama: Scene, tmp_path):
    with AdapterStore(stored(llama.shelf, tmp_path / "adapters")) as store:
        yield store


def test_a_store_serves_what_the_model_learned(llama: Scene, store):
    model, ids = CASES["llama"].base(), llama.ids()
    with loraxs_ext.AdapterPool(model, store, slots=3), loraxs_ext.adapters(model, NAMES):
        mixed = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(NAMES):
        expected = llama.alone(name).generate(input_ids=ids[row : row + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(mixed[row], expected[0])


def test_saved_packed_and_served(llama: Scene, tmp_path):
    """Folders that PEFT wrote, through `loraxs pack`, on the model as it comes from disk."""
    names, ids = ["plain", "wide", "narrow"], llama.ids()
    llama.oracle.save_pretrained(tmp_path / "users", selected_adapters=names)
    llama.base.save_pretrained(tmp_path / "base")
    wide = str(tmp_path / "users" / "wide")
    assert main(["pack", str(tmp_path / "store"), str(tmp_path / "users"), "--like", wide]) == 0
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with AdapterStore(tmp_path / "store", readonly=True) as store, loraxs_ext.AdapterPool(model, store, slots=3):
        with loraxs_ext.adapters(model, NAMES):
            mixed = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(NAMES):
        expected = llama.alone(name).generate(input_ids=ids[row : row + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(mixed[row], expected[0])


def test_more_adapters_than_slots_one_after_the_other(llama: Scene, store):
    """Every adapter is another one; a slot that kept what was in it before would show."""
    shelf, inputs = llama.shelf, llama.case.inputs(2)
    names = [f"user-{i}" for i in range(7)]
    for i, name in enumerate(names):
        row = shelf.row("wide")
        store.put(row._replace(name=name, numbers=row.numbers * (0.3 + 0.1 * i)))
    model = CASES["llama"].base()
    with loraxs_ext.AdapterPool(model, store, slots=2) as pool:
        for i, (first, second) in enumerate(zip(names, names[1:] + names[:1], strict=True)):
            with loraxs_ext.adapters(model, [first, second]):
                found = logits(model, inputs)
            for row, scale in enumerate((i, (i + 1) % len(names))):
                alone = llama.alone("wide")
                for layer in llama.oracle.modules():
                    if isinstance(layer, loraxs_ext.layers.LoraXSLayer):
                        layer.set_scale("wide", 0.3 + 0.1 * scale)
                expected = logits(alone, {"input_ids": inputs["input_ids"][row : row + 1]})
                torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-4)
        assert pool.stats()["evictions"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_rows_of_other_dtypes(llama: Scene, store, dtype):
    inputs = llama.case.inputs(1)
    store.put(in_dtype(store.row("wide"), dtype)._replace(name="small"))
    with loraxs_ext.AdapterPool(model := CASES["llama"].base(), store), loraxs_ext.adapters(model, ["small"]):
        found = logits(model, inputs)
    base, exact = logits(llama.base, inputs), logits(llama.alone("wide"), inputs)
    assert (found - exact).norm() <= 0.05 * (exact - base).norm()


def test_an_adapter_with_modules_the_pool_lacks_is_refused(llama: Scene):
    row = row_of(llama.case.model(target_modules=["o_proj"]), "default")
    llama.shelf.put("foreign", AdapterRow("foreign", 1, row.layout, row.numbers))
    with pytest.raises(RuntimeError, match="foreign.*o_proj"), loraxs_ext.adapters(llama.model, ["foreign"]):
        pass
    with loraxs_ext.adapters(llama.model, NAMES):
        pass


@pytest.fixture
def guide_folder(tmp_path, monkeypatch) -> Path:
    """A small model with a tokenizer, and beside it the folder `users` with adapters for it."""
    monkeypatch.chdir(tmp_path)
    case = CASES["llama"]
    folder = tmp_path / "model"
    case.base().save_pretrained(folder)
    words = [f"word{i}" for i in range(VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="word1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="word0", unk_token="word1").save_pretrained(folder)
    model = case.model(target_modules=["q_proj"])
    names = ["alice", "bob", "carol"]
    for seed, name in enumerate(names):
        model.add_adapter(name, case.config(target_modules=["q_proj"], init_seed=seed))
    model.save_pretrained("users", selected_adapters=names)
    return folder


def test_the_guide_runs(guide_folder):
    guide = GUIDE.read_text(encoding="utf-8")
    (command,) = re.findall(r"^    loraxs (.*?) *#", guide, re.MULTILINE)
    assert main(command.split()) == 0
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 4
    blocks[0], named = re.subn(r'name = "[^"]+"', f"name = {str(guide_folder)!r}", blocks[0])
    assert named == 1
    scope: dict = {}
    for block in blocks:
        if "source" in block:
            scope["source"] = Shelf()
        exec(block, scope)
        if "tokens" in scope:
            assert scope["tokens"].shape[0] == 3
    scope["pool"].close()
    scope["store"].close()
