"""Ranks as configurations: get_peft_model puts exactly those ranks there, with the scaling there was."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from loraxs_ext import LoraXSConfig
from loraxs_ext.advisor import snippet, with_ranks

from ..peft.models import CASES, layers_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path))


def applied(model: nn.Module, config: LoraXSConfig) -> dict[str, tuple[int, float]]:
    """Rank and scaling of every adapted module."""
    layers = layers_of(get_peft_model(model, config))
    return {layer.key: (layer.r["default"], layer.scaling["default"]) for layer in layers}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_module_gets_its_rank_and_the_scaling_there_was(name: str, use_rslora: bool) -> None:
    case = CASES[name]
    config = LoraXSConfig(r=4, lora_alpha=6, use_rslora=use_rslora, target_modules=list(case.targets))
    known = applied(case.base(), config)
    scaling = 6 / (2 if use_rslora else 4)
    for start in range(3):
        ranks = {name: (start + i * i) % 5 for i, name in enumerate(known)}
        advised = with_ranks(config, ranks)
        found = applied(case.base(), advised)
        assert {name: rank for name, (rank, _) in found.items()} == {name: r for name, r in ranks.items() if r}
        assert all(s == pytest.approx(scaling) for _, s in found.values())
        # The arguments survive JSON, and are enough.
        again = LoraXSConfig(**json.loads(json.dumps(snippet(advised))))
        assert applied(case.base(), again) == found


def test_where_all_modules_are_adapted_the_targets_stay() -> None:
    config = LoraXSConfig(target_modules="all-linear", exclude_modules=["z"], r=2, lora_alpha=2)
    advised = with_ranks(config, {"a.x": 3, "b.x": 3, "c.x": 5})
    assert (advised.target_modules, advised.exclude_modules) == ("all-linear", {"z"})
    assert (advised.r, advised.lora_alpha) == (3, 3)
    assert (advised.rank_pattern, advised.alpha_pattern) == ({"c.x": 5}, {"c.x": 5})


class Nested(nn.Module):
    """Module names that are the ends of others, or others but for a dot."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.tower = nn.ModuleDict({"q": nn.Linear(6, 6), "a": nn.ModuleDict({"q": nn.Linear(6, 6)})})
        self.towerXq = nn.Linear(6, 6)
        self.tower_a = nn.ModuleDict({"q": nn.Linear(6, 6)})


@pytest.mark.parametrize(
    "ranks",
    [
        {"q": 3, "tower.q": 2, "tower.a.q": 1, "towerXq": 4, "tower_a.q": 5},
        {"q": 3, "tower.q": 0, "tower.a.q": 1, "towerXq": 0, "tower_a.q": 0},
        {"q": 0, "tower.q": 2, "tower.a.q": 0, "towerXq": 2, "tower_a.q": 2},
        {"q": 1, "tower.q": 2, "tower.a.q": 2, "towerXq": 1, "tower_a.q": 1},
        {"q": 1, "tower.q": 1, "tower.a.q": 1, "towerXq": 1, "tower_a.q": 1},
    ],
    ids=lambda ranks: "-".join(map(str, ranks.values())),
)
def test_names_that_end_like_others(ranks: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = with_ranks(LoraXSConfig(target_modules=["q", "towerXq"]), ranks)
    found = applied(Nested(), config)
    assert {name: rank for name, (rank, _) in found.items()} == {name: rank for name, rank in ranks.items() if rank}
    assert all(math.isclose(scaling, 1.0) for _, scaling in found.values())


def test_restrictions_to_layers_do_not_outlive_a_list_of_modules() -> None:
    case = CASES["llama"]
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "r": 2}
    config = LoraXSConfig(lora_alpha=2, layers_pattern="layers", **options)
    names = list(applied(case.base(), config))
    assert len(names) == 2
    found = applied(case.base(), with_ranks(config, dict(zip(names, (0, 3), strict=True))))
    assert found == {names[1]: (3, 1.0)}


def test_no_rank_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks: expected at least one above 0"):
        with_ranks(LoraXSConfig(target_modules=["a"]), {"a": 0})
