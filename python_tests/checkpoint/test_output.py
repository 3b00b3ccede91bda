"""Folders that appear whole or not at all, whatever happens to who writes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loraxs_ext import merge
from loraxs_ext.checkpoint.output import Entry, atomic_folder, entry, write_shard

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


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "config.json").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "config.json").read_text() == "1"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_on_request(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("1", "2"):
        with atomic_folder(out, overwrite=True) as folder:
            (folder / "config.json").write_text(text)
    assert (out / "config.json").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="out exists"), atomic_folder(out):
        raise AssertionError("not reached")
    with pytest.raises(RuntimeError), atomic_folder(out, overwrite=True):
        raise RuntimeError
    assert (out / "config.json").read_text() == "2"


def test_only_models_and_adapters_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "file").write_text("dear")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "parent" / "deep" / "child").mkdir(parents=True)
    for name in ("parent", "parent/deep/child"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="holds the adapter deep/child"):
        with atomic_folder(tmp_path / "parent", overwrite=True):
            raise AssertionError("not reached")
    for name in ("home", "file", "link"):
        with pytest.raises(FileExistsError, match="is not overwritten"), atomic_folder(tmp_path / name, overwrite=True):
            raise AssertionError("not reached")
    assert sorted(tmp_path.rglob("*")) == before


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("mine")
        with pytest.raises(BlockingIOError, match="another process is writing"), atomic_folder(tmp_path / "out"):
            raise AssertionError("not reached")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


def test_many_writers_of_one_folder_and_one_makes_it(tmp_path: Path) -> None:
    made: list[Path] = []

    def write(step: int) -> None:
        target = tmp_path / str(step // 8)
        try:
            with atomic_folder(target) as folder:
                (folder / "config.json").write_text("1")
                made.append(target)
        except BlockingIOError:
            pass
        except FileExistsError:
            assert (target / "config.json").read_text() == "1"

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8 * 200)))
    assert sorted(made) == sorted(tmp_path / str(number) for number in range(200))
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(200)}


def test_shards_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "wide": torch.randn(3, 4, dtype=torch.float64),
        "half": torch.randn(5, 3).to(torch.bfloat16).mT,
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "scalar": torch.tensor(2.0),
    }
    entries = [entry(name, tensor.dtype, tensor.shape, lambda t=tensor: t) for name, tensor in tensors.items()]
    flags = torch.tensor([True, False, True])
    entries.append(Entry("flags", "BOOL", (3,), 3, lambda: flags))
    path = tmp_path / "x.safetensors"
    assert [one.name for one in write_shard(path, entries, {"format": "pt"})] == [*tensors, "flags"]
    stored = load_file(path)
    assert {name: (t.dtype, t.shape) for name, t in stored.items()} == {
        name: (t.dtype, t.shape) for name, t in {**tensors, "flags": flags}.items()
    }
    assert all(torch.equal(stored[name], tensor) for name, tensor in {**tensors, "flags": flags}.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match="short: expected 16 bytes, got 8"):
        list(write_shard(path, [entry("short", torch.float32, (4,), lambda: torch.zeros(2))], {}))


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
