"""What a divided weight is refused for; what it computes is tested in `python_tests/distributed`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from loraxs_ext.layers.tensor_parallel import find_part
from loraxs_ext.peft import LoraXSConfig

SHAPE = (6, 4)


@pytest.fixture
def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    """Of one process."""
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "cache"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def divided(mesh: DeviceMesh, placement: Shard) -> nn.Linear:
    base = nn.Linear(SHAPE[1], SHAPE[0])
    base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), mesh, [placement]))
    return base


def test_whole_layers_have_no_part() -> None:
    assert find_part(nn.Linear(4, 6), "q", torch.ones(2, 4), torch.ones(2, 6), SHAPE) is None


def test_a_part_is_known_by_its_widths(mesh: DeviceMesh) -> None:
    rows = find_part(divided(mesh, Shard(0)), "q", torch.ones(2, 4), torch.ones(2, 5), SHAPE)
    columns = find_part(divided(mesh, Shard(1)), "q", torch.ones(2, 3), torch.ones(2, 6), SHAPE)
    assert rows is not None and rows[1:] == (0, 6, True)
    assert columns is not None and columns[1:] == (0, 4, False)


def test_other_divisions_are_refused(mesh: DeviceMesh) -> None:
    x, y = torch.ones(2, 4), torch.ones(2, 5)
    for base in (nn.Linear(4, 6), divided(mesh, Shard(1)), divided(mesh, _StridedShard(0, split_factor=2))):
        with pytest.raises(TypeError, match=r"q: base_layer: expected a weight of which every process has consecutive"):
            find_part(base, "q", x, y, SHAPE)
    with pytest.raises(TypeError, match="use_local_output=True"):
        find_part(nn.Linear(4, 6), "q", x, distribute_tensor(y, mesh, [Shard(1)]), SHAPE)


def test_divided_parameters_are_refused(mesh: DeviceMesh) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = divided(mesh, Shard(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    config = LoraXSConfig(r=2, target_modules=[], target_parameters=["inner.weight"])
    model = get_peft_model(Holder(), config)
    with pytest.raises(TypeError, match="target_parameters: inner.weight: expected a parameter that this process has"):
        model(torch.ones(1, 4))


def test_weights_on_the_first_process_only_are_refused(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(RuntimeError, match="fsdp_cpu_ram_efficient_loading: expected false"):
        get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraXSConfig(r=2, target_modules=["0"]))
