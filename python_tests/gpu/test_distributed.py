"""Several GPUs train as one does: the ways of `python_tests/distributed`, over NCCL."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from python_tests.distributed.ways import ALONE, WAYS, gather_adapter, run, save_base, train

NAMES = ["DDP", "FSDP2", "TP", "FSDP2 offloaded", "FSDP2 bf16", "FSDP2 mixed"]
CELLS = [f"{name}, {kind}" for name in NAMES for kind in WAYS[name].kinds]
WORLD = 2
# Sums in another order; half precision rounds them.
LOSS = {"FSDP2 bf16": 1e-2, "FSDP2 mixed": 1e-2}
VALUE = {"FSDP2 bf16": 2e-2, "FSDP2 mixed": 5e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason=f"needs {WORLD} CUDA devices"),
]


def work(rank: int, folder: Path, port: int) -> None:
    """One process with a GPU of its own."""
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["LORAXS_CACHE"] = str(folder / f"cache{rank}")
    torch.cuda.set_device(rank)
    # Gloo gathers what is offloaded to the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl")
    torch.save(run(folder, NAMES, "cuda", folder / "adapters"), folder / f"results{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the processes found, by process, and what one GPU finds."""
    folder = tmp_path_factory.mktemp("nccl")
    save_base(folder / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (folder, port), nprocs=WORLD)
    alone = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAXS_CACHE", str(folder / "cache alone"))
        for dtype, kinds in ((torch.float32, WAYS["DDP"].kinds), (torch.bfloat16, ("LoRA-XS",))):
            for kind in kinds:
                model, losses = train(folder, ALONE._replace(dtype=dtype), kind, "cuda")
                values = {name: value.detach().float().cpu() for name, value in gather_adapter(model).items()}
                alone[f"{kind}, {dtype}"] = {"losses": losses, "values": values}
    return [torch.load(folder / f"results{rank}") for rank in range(WORLD)], alone


@pytest.mark.parametrize("cell", CELLS)
def test_as_on_one_gpu(results: tuple[list[dict[str, Any]], dict[str, Any]], cell: str) -> None:
    found, alone = results
    name, kind = cell.split(", ")
    expected = alone[f"{kind}, {WAYS[name].dtype}"]
    mine, theirs = (result[cell] for result in found)
    assert mine["losses"] == pytest.approx(expected["losses"], rel=LOSS.get(name, 1e-4))
    for key, value in mine["values"].items():
        assert torch.equal(value, theirs["values"][key]), key
        if key.endswith((".weight", ".v")):
            torch.testing.assert_close(value, expected["values"][key], rtol=0, atol=VALUE.get(name, 1e-3), msg=key)
