"""Two processes decompose one model: each its share, both with the same bits, sharded weights included."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from peft import get_peft_model
from torch import Tensor, nn

from loraxs_ext.basis import Factors, Recipe, across_ranks, decompose, decompose_across, decomposition, distributed
from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft import LoraXSConfig

from .matrices import gaussian, power_law

WORLD = 2
RECIPE = Recipe(sigma="sqrt")
RANKS = {"up": 4, "down": 4, "q": 7, "double": 3, "half": 4}


def model() -> dict[str, Tensor]:
    return {
        "up": power_law(130, 70, 0.5).float(),
        "q": power_law(70, 70, 0.4, seed=2).float(),
        "down": power_law(70, 131, 0.5, seed=4).float(),
        "double": power_law(33, 50, 0.3, seed=6),
        "half": power_law(51, 40, 0.3, seed=8).bfloat16(),
    }


def shapes() -> dict[str, tuple[int, int]]:
    return {name: (W.shape[0], W.shape[1]) for name, W in model().items()}


class Net(nn.Module):
    """A body with a layer of odd widths, which no shard divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(40, 51), nn.Linear(51, 33, bias=False), nn.Linear(33, 40)
        for i, layer in enumerate((self.first, self.second, self.head)):
            with torch.no_grad():
                layer.weight.copy_(power_law(*layer.weight.shape, 0.4, seed=i))
                if layer.bias is not None:
                    layer.bias.copy_(gaussian(len(layer.bias), seed=i))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


CONFIG = {"r": 5, "target_modules": ["first", "second", "head"], "init_weights": False}


def parts(factors: dict[str, Factors]) -> dict[str, Any]:
    return {name: [f.a, f.bt, f.s, f.subspace_error, f.fingerprint] for name, f in factors.items()}


def layer_parts(adapted: nn.Module) -> dict[str, list[Tensor]]:
    return {m.key: [m.loraxs_A, m.loraxs_Bt] for m in adapted.modules() if isinstance(m, LoraXSLayer)}


def sharded_net() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    net = Net()
    for layer in net.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


# What each process does; its results go to a file.


def plain(folder: Path, rank: int) -> dict[str, Any]:
    solved: list[int] = []
    solve = decomposition.solve

    def counting(stack: Tensor, *rest: Any) -> Any:
        solved.append(len(stack))
        return solve(stack, *rest)

    decomposition.solve = counting
    try:
        options = {"shapes": shapes(), "cache_dir": folder / f"cache{rank}", "progress": False}
        found = decompose_across(model(), RANKS, RECIPE, **options)
        first = sum(solved)
        again = decompose_across(model(), RANKS, RECIPE, **options)
    finally:
        decomposition.solve = solve
    return {"factors": parts(found), "again": parts(again), "solved": [first, sum(solved) - first]}


def loaded(folder: Path, rank: int) -> dict[str, Any]:
    """Functions are called by the owner alone, in groups other than the default one too."""
    called: list[str] = []

    def loader(name: str, weight: Tensor) -> Callable[[], Tensor]:
        return lambda: called.append(name) or weight

    weights = {name: loader(name, weight) for name, weight in model().items()}
    group = dist.new_group([0, 1])
    found = decompose_across(weights, RANKS, RECIPE, shapes=shapes(), group=group, progress=False)
    return {"factors": parts(found), "called": called}


def sharded(folder: Path, rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    alive: list[weakref.ref[Tensor]] = []
    most = 0
    gather = distributed.gather

    def watched(weight: Any) -> Tensor:
        nonlocal most
        full = gather(weight)
        alive.append(weakref.ref(full))
        most = max(most, sum(ref() is not None for ref in alive))
        return full

    distributed.gather = watched
    mesh = init_device_mesh("cpu", (WORLD,))
    placements = [Shard(i % 2) for i in range(5)]
    weights: dict[str, Any] = {
        name: distribute_tensor(W, mesh, [placement])
        for (name, W), placement in zip(model().items(), placements, strict=True)
    }
    try:
        found = decompose_across(weights, RANKS, RECIPE, shapes=shapes(), progress=False)
    finally:
        distributed.gather = gather
    return {"factors": parts(found), "gathered": len(alive), "most": most}


def failing(folder: Path, rank: int) -> dict[str, Any]:
    """One process finds a NaN; the other must not wait for ever."""
    weights = model()
    weights["q"][3, 3] = torch.nan
    try:
        decompose_across(weights, RANKS, RECIPE, shapes=shapes(), progress=False)
    except (ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def adapted(folder: Path, rank: int) -> dict[str, Any]:
    """PEFT on a plain and on a sharded model, with and without the context."""
    with across_ranks():
        plain_model = get_peft_model(Net(), LoraXSConfig(**CONFIG))
        sharded_model = get_peft_model(sharded_net(), LoraXSConfig(**CONFIG))
    alone = get_peft_model(sharded_net(), LoraXSConfig(**CONFIG))
    x = gaussian(3, 40)
    return {
        "plain": layer_parts(plain_model),
        "sharded": layer_parts(sharded_model),
        "alone": layer_parts(alone),
        "plain output": plain_model(x).detach(),
        "sharded output": sharded_model(x).detach(),
    }


TASKS = (plain, loaded, sharded, failing, adapted)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        # Caches that are not shared, so that only what the processes tell each other can agree.
        patch.setenv("LORAXS_CACHE", str(folder / f"default{rank}"))
        for task in TASKS:
            results[task.__name__] = task(folder, rank)
    torch.save(results, folder / f"results{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes found, by process."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"results{rank}") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    cache, threads = tmp_path_factory.mktemp("cache"), torch.get_num_threads()
    # As many as the processes of `work` have: BLAS splits its sums among threads.
    torch.set_num_threads(1)
    try:
        return parts(decompose(model(), RANKS, RECIPE, cache_dir=cache, progress=False))
    finally:
        torch.set_num_threads(threads)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[name], two[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return torch.equal(one, two) and one.dtype == two.dtype if isinstance(one, Tensor) else one == two


def test_each_decomposes_its_share_and_all_hold_the_same_bits(results: list[dict[str, Any]], alone: dict) -> None:
    mine, theirs = (result["plain"] for result in results)
    assert same(mine["factors"], theirs["factors"]) and same(mine["factors"], alone)
    shares = distributed.split_by_cost(shapes(), RANKS, WORLD)
    assert [mine["solved"][0], theirs["solved"][0]] == [len(share) for share in shares] and all(map(len, shares))


def test_owners_keep_what_they_computed(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["plain"]["solved"][1] == 0 and same(result["plain"]["again"], result["plain"]["factors"])


def test_loaders_are_called_by_their_owner_only(results: list[dict[str, Any]], alone: dict) -> None:
    shares = distributed.split_by_cost(shapes(), RANKS, WORLD)
    for result, share in zip(results, shares, strict=True):
        assert sorted(result["loaded"]["called"]) == sorted(share)
        for name, part in result["loaded"]["factors"].items():
            # Without a cache nothing was hashed.
            assert part[4] is None and same(part[:4], alone[name][:4])


def test_sharded_weights_are_gathered_one_at_a_time(results: list[dict[str, Any]], alone: dict) -> None:
    for result in results:
        assert all(same(part[:4], alone[name][:4]) for name, part in result["sharded"]["factors"].items())
        assert result["sharded"]["gathered"] == len(model())
    # The first one keeps its own while the other's is gathered; the second one has dropped that before its own comes.
    assert [result["sharded"]["most"] for result in results] == [2, 1]


def test_a_failure_is_raised_everywhere(results: list[dict[str, Any]]) -> None:
    owner = next(i for i, share in enumerate(distributed.split_by_cost(shapes(), RANKS, WORLD)) if "q" in share)
    said = "ValueError: weight 'q' contains NaN"
    assert results[owner]["failing"]["error"] == said
    assert results[1 - owner]["failing"]["error"] == f"RuntimeError: process {owner} of the group failed: {said}"


def test_adapted_models_agree(results: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path))
    net = get_peft_model(Net(), LoraXSConfig(**CONFIG))
    expected = layer_parts(net)
    for result in results:
        found = result["adapted"]
        assert same(found["plain"], expected) and same(found["sharded"], expected) and same(found["alone"], expected)
        for output in ("plain output", "sharded output"):
            torch.testing.assert_close(found[output], net(gaussian(3, 40)).detach(), rtol=1e-5, atol=1e-5)


def test_the_split_is_even_and_deterministic() -> None:
    sizes = {f"layer{i}.{name}": shape for i in range(12) for name, shape in (("q", (64, 64)), ("up", (256, 64)))}
    for parts_ in (1, 2, 3, 5):
        shares = distributed.split_by_cost(sizes, 8, parts_)
        assert shares == distributed.split_by_cost(dict(reversed(sizes.items())), 8, parts_)
        assert sorted(name for share in shares for name in share) == sorted(sizes)
        loads = [sum(sizes[name][0] * sizes[name][1] for name in share) for share in shares]
        assert max(loads) - min(loads) <= 256 * 64
    ranked = distributed.split_by_cost(sizes, {name: 500 if name == "layer0.q" else 1 for name in sizes}, 2)
    assert ranked[0][0] == "layer0.q"
    assert distributed.split_by_cost({"a": (3, 3)}, 1, 3) == [["a"], [], []]


def test_without_processes_there_is_nothing_to_share() -> None:
    assert distributed.active_group() is None
    with pytest.raises(RuntimeError, match="across_ranks needs torch.distributed"), across_ranks():
        pass


def test_weights_that_deepspeed_partitions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path))
    monkeypatch.setattr("loraxs_ext.peft.weights.active_group", lambda: object())
    net = Net()
    net.second.weight.ds_id = 3
    with pytest.raises(ValueError, match="second: base_layer: expected a weight that one process can read"):
        get_peft_model(net, LoraXSConfig(**CONFIG))
