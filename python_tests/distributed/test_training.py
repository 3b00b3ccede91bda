"""Two processes train as one does: the same losses, the same R, the same file, however the model is spread."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from . import runs
from .ways import ALONE, WAYS, batches, gather_adapter, save_base, serve, train
from .world import WEIGHTS, WORLD, work

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CELLS = [f"{name}, {kind}" for name, way in WAYS.items() for kind in way.kinds]
# Sums in another order, which Adam's first steps of equal size carry into R; half precision rounds them.
LOSS = {"FSDP2 bf16": 5e-3, "FSDP2 mixed": 5e-3}
VALUE = {"FSDP2 bf16": 5e-3, "FSDP2 mixed": 5e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("distributed")
    save_base(place / "base")
    runs.prepare(place)
    return place


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """What the processes found, by process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (folder, port), nprocs=WORLD)
    return [torch.load(folder / f"results{rank}") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process finds, and the adapters it saves."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAXS_CACHE", str(folder / "cache alone"))
        for dtype in (torch.float32, torch.bfloat16):
            for kind in WAYS["DDP"].kinds if dtype == torch.float32 else ("LoRA-XS",):
                model, losses = train(folder, ALONE._replace(dtype=dtype), kind, "cpu")
                if dtype == torch.float32:
                    model.save_pretrained(folder / "alone" / kind)
                values = {name: value.detach().float() for name, value in gather_adapter(model).items()}
                found[f"{kind}, {dtype}"] = {"losses": losses, "values": values}
    return found


def trained(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if name.endswith((".weight", ".v"))}


@pytest.mark.parametrize("cell", CELLS)
def test_as_in_one_process(results: list[dict[str, Any]], alone: dict[str, Any], cell: str) -> None:
    name, kind = cell.split(", ")
    expected = alone[f"{kind}, {WAYS[name].dtype}"]
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    for result in results:
        assert result["ways"][cell]["losses"] == pytest.approx(expected["losses"], rel=LOSS.get(name, 1e-6))
    found = trained(results[0]["ways"][cell]["values"])
    assert found.keys() == trained(expected["values"]).keys() and found
    for key, value in found.items():
        torch.testing.assert_close(value, expected["values"][key], rtol=0, atol=VALUE.get(name, 1e-5), msg=key)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.startswith("FSDP1")])
def test_processes_hold_the_same_bits(results: list[dict[str, Any]], cell: str) -> None:
    mine, theirs = (result["ways"][cell]["values"] for result in results)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_saved_is_plain_and_complete(
    results: list[dict[str, Any]], alone: dict[str, Any], folder: Path, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kind = cell.split(", ")
    saved, expected = (load_file(folder / place / WEIGHTS) for place in (f"adapters/{name}/{kind}", f"alone/{kind}"))
    assert {n: (t.shape, t.dtype) for n, t in saved.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    for key, value in trained(results[0]["ways"][cell]["values"]).items():
        assert torch.equal(saved[key.replace(".default", "")].float(), value)
    if name in VALUE:
        return
    monkeypatch.setenv("LORAXS_CACHE", str(folder / "cache alone"))
    places = (folder / "adapters" / name / kind, folder / "alone" / kind)
    logits, theirs = (serve(folder, place, batches()[0, 0], "cpu") for place in places)
    torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-3)


def test_fsdp1_gives_the_adapter_to_the_first_process(results: list[dict[str, Any]]) -> None:
    assert results[0]["ways"]["FSDP1, LoRA-XS"]["values"] and not results[1]["ways"]["FSDP1, LoRA-XS"]["values"]


def test_nested_fsdp1_is_saved_completely(results: list[dict[str, Any]], folder: Path) -> None:
    assert set(results[0]["nested"]) == set(load_file(folder / "alone" / "LoRA-XS" / WEIGHTS))


def test_ddp_never_sends_the_basis(results: list[dict[str, Any]]) -> None:
    for result in results:
        noted = result["broadcasts"]
        assert noted["frozen"] > 0 and noted["sent of them"] == 0
        # What a step sends is the buffers of the model itself, and nothing else.
        assert noted["in a step"] == noted["other buffers"]


def test_fsdp2_models_save_and_load(results: list[dict[str, Any]], folder: Path) -> None:
    expected = load_file(folder / "alone" / "LoRA-XS" / WEIGHTS)
    for result in results:
        found = result["sharded"]
        assert set(found["held"].values()) == {"DTensor"}
        assert found["loaded"] and found["turned"] < 1e-6
        assert found["by PEFT"] == {name: tensor.shape for name, tensor in expected.items()}


def test_tensor_parallel_models_load(
    results: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(folder / "cache alone"))
    expected = serve(folder, folder / "adapters" / "DDP" / "LoRA-XS", batches()[0, 0], "cpu")
    for result in results:
        torch.testing.assert_close(result["tp"]["logits"], expected, rtol=1e-5, atol=1e-5)
        merging, dropping = result["tp"]["errors"]
        assert "expected a complete weight to merge into, got one that is sharded" in merging
        assert "use_edora" in dropping and "loraxs_dropout=0" in dropping


def test_masks_agree_where_they_must(results: list[dict[str, Any]]) -> None:
    mine, theirs = (result["tp"]["dropped"] for result in results)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine) and any(g.any() for g in mine.values())


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    """`loraxs train` in one process, on as many rows a step."""
    pytest.importorskip("tensorboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAXS_CACHE", str(folder / "cache alone"))
        return runs.train(runs.make_run(runs.values(folder, "single", 4 * WORLD)))


@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_loraxs_train(results: list[dict[str, Any]], single: dict[str, Any], name: str) -> None:
    expected = load_file(Path(single["adapter"]) / WEIGHTS)
    for result in results:
        assert result["runs"][f"{name}, kind"] == ("DTensor" if name == "FSDP2" else "Tensor")
        # The session after the interruption goes on from the last checkpoint.
        assert result["runs"][f"{name}, first step"] == 3
        for run in (result["runs"][f"{name}, at once"], result["runs"][f"{name}, interrupted"]):
            assert run["steps"] == single["steps"] == 8 and run["processes"] == WORLD
            assert run["parameters"] == single["parameters"] and run["bytes"] == single["bytes"]
            assert run["dev"]["loss"] == pytest.approx(single["dev"]["loss"], rel=1e-4)
            assert run["loss"]["last"] == pytest.approx(single["loss"]["last"], rel=1e-4)
            found = load_file(Path(run["adapter"]) / WEIGHTS)
            assert found.keys() == expected.keys()
            for key, tensor in found.items():
                torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-4, msg=key)


def test_a_classifier_has_the_mean_loss_of_its_rows(
    results: list[dict[str, Any]], single: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over processes, and over accumulated batches."""
    monkeypatch.setenv("LORAXS_CACHE", str(folder / "cache alone"))
    together = runs.train(runs.make_run(runs.reviews_run(folder, "together", batch=8)))
    in_turn = runs.train(runs.make_run(runs.reviews_run(folder, "in turn", batch=4, accumulate=2)))
    assert together["loss"]["first"] == pytest.approx(0.69, abs=0.05)  # ln 2
    expected = load_file(Path(together["adapter"]) / WEIGHTS)
    for run in (results[0]["runs"]["classifier"], in_turn):
        for when in ("first", "last"):
            assert run["loss"][when] == pytest.approx(together["loss"][when], rel=1e-4)
        for key, tensor in load_file(Path(run["adapter"]) / WEIGHTS).items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-4, msg=key)


def test_the_tensor_parallel_example_runs(folder: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    given = {"model": folder / "llama", "train": folder / "train.jsonl", "output": folder / "example", "epochs": 2}
    options = [f"--{name}={value}" for name, value in given.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LORAXS_CACHE": str(folder / "cache alone")}
    command = [sys.executable, *launch, "examples/tensor_parallel.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "llama"), folder / "example")
