"""The README's Python runs as printed, on a small model in place of the one it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def model_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["<pad>", "<unk>", "LoRA", "-", "XS", "trains", "an", "r", "by", "matrix", ".", "answer", "this"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_quick_start_and_mixed_batch(model_folder):
    start, mixed = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[:2]
    start, named = re.subn(r'name = "[^"]+"', f"name = {str(model_folder)!r}", start)
    assert named == 1
    scope: dict[str, object] = {}
    exec(start, scope)
    for name in ("alice", "bob"):
        Path("my-adapter").rename(name)
        scope["model"].save_pretrained("my-adapter")
    exec(mixed.replace("model.generate(", "output = model.generate("), scope)
    assert scope["output"].shape[0] == 3


def test_op_lines_are_equal_to_what_they_say():
    from loraxs_ext import ops

    rows = dict(
        re.findall(r"^\| `(linear|add_delta)\([^`]*\)` \| `([^`]+)` \|$", README.read_text("utf-8"), re.MULTILINE)
    )
    assert set(rows) == {"linear", "add_delta"}
    g = torch.Generator().manual_seed(0)
    x, W, bias, a, b, y = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((6, 20), (12, 20), (12,), (4, 20), (12, 4), (6, 12))
    )
    pages = torch.randn(3, 4, 4, generator=g, dtype=torch.float64)
    slots = torch.tensor([0, 1, 2, 2, 1, 0], dtype=torch.int32)
    scope = {"torch": torch, "F": torch.nn.functional, "drop": lambda t: t, "R": pages[slots.long()], "s": 0.7}
    scope |= {"x": x, "W": W, "bias": bias, "a": a, "b": b, "y": y}
    torch.testing.assert_close(ops.linear(x, W, bias, a, b, pages, slots, 0.7), eval(rows["linear"], scope))
    torch.testing.assert_close(ops.add_delta(y, x, a, b, pages, slots, 0.7), eval(rows["add_delta"], scope))
