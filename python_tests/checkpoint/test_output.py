"""What `merge` writes: a whole folder or none, and what is copied beside the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from loraxs_ext import merge

from ..peft.models import CASES
from .folders import save

ROOT = Path(__file__).parents[2]

# Three children die by SIGKILL after so many tensors; they are forked before torch has started any thread.
KILLED = """
import os, signal, sys
from loraxs_ext import cli
from loraxs_ext.checkpoint import merging
real = merging.write_shard
def dying(left):
    def write(*arguments):
        for one in real(*arguments):
            yield one
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    return write
for count in (0, 7, 20):
    child = os.fork()
    if child == 0:
        merging.write_shard = dying([count])
        os._exit(cli.main(["merge", *sys.argv[1:]]))
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not os.path.exists(sys.argv[3])
"""


def test_a_killed_merge_leaves_nothing_under_its_name_and_can_be_repeated(tmp_path: Path) -> None:
    folders = save(CASES["llama"], tmp_path)
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(folders.base), str(folders.adapter), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    left = tmp_path / ".out.partial"
    assert left.is_dir() and list(left.iterdir()) and not output.exists()
    merge(folders.base, folders.adapter, output, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    assert torch.equal(folders.logits(folders.load(output)), folders.logits(folders.adapted().merge_and_unload()))


def test_what_is_copied_beside_the_weights(tmp_path: Path) -> None:
    """Tokenizer and templates, from a folder of links as the hub's cache has them; weights of other formats stay."""
    folders = save(CASES["llama"], tmp_path, shard="1GB")
    blobs = tmp_path / "blobs"
    folders.base.rename(blobs)
    folders.base.mkdir()
    for blob in blobs.iterdir():
        (folders.base / blob.name).symlink_to(blob)
    (folders.base / "1_Pooling").mkdir()
    (folders.base / ".git").mkdir()
    for name in ("tokenizer.json", "1_Pooling/config.json", "vocab.txt", "pytorch_model.bin", ".git/x.json"):
        (folders.base / name).write_text("{}")
    merge(folders.base, folders.adapter, tmp_path / "out", progress=False)
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        "1_Pooling/config.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "vocab.txt",
    ]  # fmt: skip
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((blobs / "config.json").read_text())
