"""The advice benchmark: its plan and tables on made-up runs, and one tiny training of each kind where weights are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from benchmarks import _advice_report, advice
from benchmarks.advice import RATES, SEEDS, Arm, Run, Scale, arms, benchmark, best_rate, equalise_gain, pending
from examples.demo import fetch
from loraxs_ext.basis.cache import cache_directory

from ..peft.models import CASES, layers_of

Score = Callable[[Run], float]


def runs(plan: list[Arm], accuracy: Score, dev_loss: Score = lambda run: run.lr) -> list[dict[str, Any]]:
    """Rows of every run that the plan asks for, in its order."""
    rows: list[dict[str, Any]] = []
    for arm in plan:
        while left := pending(arm, rows):
            score = accuracy(left[0])
            rows.append({**left[0].key, "dev_loss": dev_loss(left[0]), "test_accuracy": score, "test_loss": 1 - score})
    return rows


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    where = {f"{row['task']}, {row['budget']}": {"promise": [0.5, 0.7]} for row in rows}
    return {"advice": where, "rows": rows}


def test_every_arm_tries_the_same_rates_and_keeps_the_best_on_dev() -> None:
    arm = Arm("movie", 2304)
    rows = runs([arm], lambda run: 0.5, lambda run: -run.lr)
    assert [(row["lr"], row["seed"]) for row in rows[: len(RATES)]] == [(lr, SEEDS[0]) for lr in RATES]
    best = max(RATES)
    assert best_rate(arm, rows) == best
    assert [(row["lr"], row["seed"]) for row in rows[len(RATES) :]] == [(best, seed) for seed in SEEDS[1:]]
    assert pending(arm, rows) == []
    assert pending(Arm("movie", 2304, "advised"), rows)[0].lr == RATES[0]
    del rows[0]
    assert [(run.lr, run.seed) for run in pending(arm, rows)] == [(RATES[0], SEEDS[0])]


def test_arms_differ() -> None:
    plan = arms()
    assert len(plan) == len(set(plan)) and len({arm.task for arm in plan}) == 3
    assert {(arm.ranks, arm.budget) for arm in plan} >= {("advised", 2304), ("uniform", 9216)}
    assert {arm.vectors for arm in plan} == {"top", "middle", "bottom", "random"}


def test_tables_pair_the_seeds() -> None:
    gains = {"uniform": 0.0, "advised": 0.02}
    plan = [Arm("movie", 2304, ranks) for ranks in gains]
    found = result(runs(plan, lambda run: 0.8 + 0.01 * run.seed + gains[run.arm.ranks]))
    text = _advice_report.tables(found)
    assert "| movie, 2,304 | 81.0 ± 1.0 (n = 3) | 83.0 ± 1.0 (n = 3) | +2.0 ± 0.0 | -0.020 ± 0.000 | +60% |" in text
    assert "Which singular vectors" not in text
    # The runs at another learning rate that tuning left behind do not count.
    assert len(found["rows"]) == 2 * (len(RATES) + len(SEEDS) - 1)


def test_tables_of_vectors_and_a_figure(tmp_path: Path) -> None:
    plan = [arm for arm in arms() if arm.task == advice.ABLATED and arm.budget == 2304]
    score = {"top": 0.9, "middle": 0.8, "bottom": 0.7, "random": 0.75}
    found = result(runs(plan, lambda run: score[run.arm.vectors] + 0.001 * run.seed))
    text = _advice_report.tables(found)
    for vectors, accuracy in score.items():
        for gain in ("own", "equal"):
            assert f"| {vectors}, {gain} gain | {min(RATES):g} | {100 * accuracy + 0.1:.1f} ± 0.1 (n = 3) |" in text
    pytest.importorskip("matplotlib")
    (path,) = _advice_report.draw(found, tmp_path / "new")
    assert path.read_text(encoding="utf-8").count("</svg>") == 1 and path.stat().st_size < 60_000


def test_an_unfinished_benchmark_can_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = runs([Arm("movie", 2304, ranks) for ranks in ("uniform", "advised")], lambda run: 0.5)[:5]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result(rows)))
    assert advice.main(["--report", "--results", str(path)]) == 0
    assert "(n = 1)" in capsys.readouterr().out
    assert _advice_report.tables(result([])) == ""


def test_equal_gain_keeps_directions_and_levels_their_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path))
    case = CASES["bert"]
    model, levelled = (get_peft_model(case.base(), case.config()) for _ in range(2))
    equalise_gain(levelled)
    for before, after in zip(layers_of(model), layers_of(levelled), strict=True):
        (a, bt), (level, same) = before.basis_rows(4), after.basis_rows(4)
        s = torch.linalg.svdvals(before.frozen_weight())
        torch.testing.assert_close(level.norm(dim=1), s.square().mean().sqrt().expand(4))
        torch.testing.assert_close(torch.cosine_similarity(level, a), torch.ones(4))
        assert torch.equal(bt, same)


def test_tiny_runs_on_real_weights_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cache_directory("default")
    assert root is not None
    for package in (fetch.ENCODER, fetch.SENTENCES):
        if not fetch.is_complete(root / "packages" / f"{package.name}-{package.version}", package):
            pytest.skip("the demo's packages are not downloaded: make demo does that")
    monkeypatch.setattr(advice, "RATES", (1e-2,))
    monkeypatch.setattr(advice, "SEEDS", (0,))
    monkeypatch.setattr(advice, "TASKS", ("movie",))
    scale = Scale(rows=(32, 16, 16), epochs=1, calibration=32, rank_max=16)
    path = tmp_path / "advice.json"
    threads = torch.get_num_threads()
    try:
        benchmark(path, scale, [Arm("movie", 2304, "advised")])
        first = json.loads(path.read_text())
        benchmark(path, scale, [Arm("movie", 2304, "advised"), Arm("movie", 2304, vectors="random", gain="equal")])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(path.read_text())["rows"]
    assert rows[:1] == first["rows"] and len(rows) == 2
    assert rows[0]["parameters"] <= 2304 and rows[1]["parameters"] == 2304
    assert all(0 <= row["test_accuracy"] <= 1 and row["test_loss"] > 0 for row in rows)
    assert max(first["checks"].values()) < 1e-2
    with pytest.raises(ValueError, match="results: expected runs of"):
        benchmark(path, Scale())
