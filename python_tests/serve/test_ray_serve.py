"""Two replicas behind Ray Serve: every adapter at home on one of them, every answer its own. Needs ray[serve]."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ..peft.models import CASES, VOCABULARY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason='Ray is not installed; pip install "ray[serve]"'
    ),
]


def test_two_replicas(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "The": 2, "sea": 3, "is": 4, **{f"w{i}": i for i in range(5, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(tmp_path)
    CASES["llama"].base().save_pretrained(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "examples.ray_serve", "--model", str(tmp_path), "--port", str(port)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert found.stdout.count(": home of user") == 2
    assert "50 answers, each that of its adapter alone" in found.stdout
