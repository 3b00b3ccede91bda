"""The benchmark of serving in small: everything is walked through, nothing wrong gets a figure, sections merge."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("lmdb")

from benchmarks import serving  # noqa: E402
from benchmarks._tables import serving_tables  # noqa: E402
from benchmarks.serve import catalogue, generation, results, zipf  # noqa: E402
from benchmarks.serve.loop import TIE, WrongTokens, shortfall, timed_generate  # noqa: E402
from benchmarks.serve.workload import RandomAdapters, manifest_of, targets, tiny_workload  # noqa: E402
from loraxs_ext.serve import AdapterPool  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "bases"))


@pytest.fixture
def adapters() -> RandomAdapters:
    model = tiny_workload().load(torch.float32)
    return RandomAdapters(list(targets(model)), 1200)


def test_smoke_walks_through_every_section_and_reports_no_figure(tmp_path, capsys):
    path, store = tmp_path / "out" / "smoke.json", tmp_path / "store"
    assert serving.main(["--smoke", "--output", str(path), "--store", str(store)]) == 0
    result = json.loads(path.read_text())
    assert result["dry_run"] and result["targets"] == []
    assert list(result["sections"]) == list(serving.SECTIONS)
    assert {row["section"] for row in result["rows"]} == set(serving.SECTIONS)
    assert all(row["checked"] for row in result["rows"])
    assert "tokens_per_second" not in capsys.readouterr().out
    assert [p.name for p in path.parent.iterdir()] == ["smoke.json"]
    # The store that was kept is used again, and its rate is not that of this run.
    serving.main(["--smoke", "--only", "pack", "--output", str(path), "--store", str(store)])
    again = json.loads(path.read_text())
    assert again["rows"][-1]["section"] == "pack" and again["rows"][-1]["adapters_per_second"] is None
    assert len(again["rows"]) == len(result["rows"])
    by_section = {row["section"]: row for row in result["rows"]}
    assert by_section["attach"]["evictions"] > 0 and by_section["zipf"]["evictions"] > 0
    assert by_section["zipf"]["failed_requests"] == 0 and by_section["pack"]["adapters_per_second"] > 0


class Mixed(AdapterPool):
    """Gives every row the adapter of its neighbour."""

    def adapters(self, names, timeout=None):
        return super().adapters([*names[1:], names[0]], timeout)


class Idle(AdapterPool):
    """Gives every row the base model."""

    def adapters(self, names, timeout=None):
        return super().adapters([None] * len(names), timeout)


@pytest.mark.parametrize(("pool_class", "message"), [(Mixed, "misses its own"), (Idle, "the base model alone")])
def test_no_figure_for_rows_with_another_adapter(adapters, pool_class, message):
    workload = tiny_workload()
    adapters.manifest = manifest_of(workload.load(torch.float32))
    cell = generation.TINY[1]
    with pool_class(workload.load(torch.float32), adapters, slots=8) as pool:
        batch = workload.prompts(cell.adapters, cell.prompt)
        with pytest.raises(WrongTokens, match=message):
            generation.check(cell, batch, workload.load(torch.float32), pool, adapters.names(cell.adapters))


def test_a_section_that_is_wrong_costs_no_other(tmp_path, monkeypatch, capsys):
    def wrong(*_: object):
        yield row("generation", provider="loraxs", checked={})
        raise WrongTokens("why")

    def missing(*_: object):
        raise catalogue.WrongRow("gone")

    monkeypatch.setattr(generation, "measure", wrong)
    monkeypatch.setattr(catalogue, "measure_pack", missing)
    path = tmp_path / "smoke.json"
    sections = ["generation", "pack", "attach"]
    assert serving.main(["--smoke", "--only", *sections, "--output", str(path)]) == 1
    assert [r["section"] for r in json.loads(path.read_text())["rows"]] == ["generation", "attach"]
    errors = capsys.readouterr().err
    assert "FAILED generation: why" in errors and "FAILED pack: gone" in errors


def test_shortfall_is_zero_for_the_rows_own_tokens_and_large_for_others():
    workload = tiny_workload()
    model, batch = workload.load(torch.float32), workload.prompts(3, 6)
    tokens = timed_generate(model, batch, 4).tokens
    assert all(shortfall(model, batch, i, tokens) <= TIE[torch.float32] for i in range(3))
    assert shortfall(model, batch, 1, (tokens + 1) % 200 + 3) > 0.1


def test_adapters_are_those_of_their_names(adapters, tmp_path):
    assert torch.equal(adapters.row("user-0001100").numbers, adapters.block(1)[100])
    assert sum(len(rows) for rows in adapters.blocks()) == 1200 and adapters.block(1).shape[0] == 200
    for name in ("user-1200", "user-x", "me"):
        with pytest.raises(KeyError):
            adapters.row(name)


def test_a_store_with_another_row_is_found_out(adapters, tmp_path):
    manifest = manifest_of(tiny_workload().load(torch.float32))
    store, _ = catalogue.make_store(tmp_path / "store", manifest, adapters)
    with store:
        assert catalogue.check_rows(store, adapters) > 10
        store.put(adapters.row("user-0000001")._replace(name="user-0001199"))
        with pytest.raises(catalogue.WrongRow, match="user-0001199: other numbers"):
            catalogue.check_rows(store, adapters)
        store.delete("user-0000700")
        with pytest.raises(catalogue.WrongRow, match="expected 1200 adapters"):
            catalogue.check_rows(store, adapters)


def test_the_trace_is_zipfs(adapters):
    trace = zipf.TINY._replace(adapters=1000, wave=500)
    waves = zipf.draw(trace, adapters, 40)
    names = [name for names in waves for name in names]
    counts = sorted((names.count(name) for name in set(names)), reverse=True)
    assert len(names) == 20_000 and waves == zipf.draw(trace, adapters, 40)
    # 1/1, 1/2 and 1/10 of the most popular, whose share is 1 / (1 + 1/2 + … + 1/1000).
    expected = 20_000 / sum(1 / k for k in range(1, 1001))
    for k in (1, 2, 10):
        assert counts[k - 1] == pytest.approx(expected / k, rel=0.2)


def row(section: str, **fields: object) -> dict[str, object]:
    return {"section": section, **fields}


def generated(adapters: int, dtype: str, base: float, ratio: float) -> dict[str, object]:
    rates = {"base model": base, "loraxs": base * ratio}
    return row(
        "generation", provider="loraxs", adapters=adapters, dtype=dtype, tokens_per_second=rates,
        decode_tokens_per_second=rates, ratio=ratio, decode_ratio=ratio, prefill_ratio=ratio,
    )  # fmt: skip


def test_sections_merge_and_another_machine_starts_anew(tmp_path, monkeypatch):
    now = {"device": "A", "threads": 2, "torch": "2", "python": "3", "date": "d1", "commit": "c1"}
    now["uncommitted_changes"] = False
    monkeypatch.setattr(results, "environment", lambda: dict(now))
    path = tmp_path / "serving.json"
    merge = partial(results.merge, path)
    merge("attach", [row("attach", p99_ms=1.0)])
    now["commit"] = "c2"
    merge("zipf", [row("zipf", ratio=0.9, failed_requests=0)])
    result = merge("attach", [row("attach", p99_ms=3.0)])
    assert [r["section"] for r in result["rows"]] == ["zipf", "attach"] and result["rows"][1]["p99_ms"] == 3.0
    assert result["sections"]["attach"]["commit"] == "c2"
    assert json.loads(path.read_text()) == result
    now["threads"] = 1
    assert list(merge("zipf", [row("zipf", ratio=1.0, failed_requests=0)])["sections"]) == ["zipf"]
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected results of kind 'serving'"):
        merge("zipf", [])


def test_promises_are_judged_in_the_dtype_that_is_fastest_for_the_base():
    rows = [generated(1, "bfloat16", 20, 1.2), generated(1, "float32", 30, 0.9), generated(64, "bfloat16", 500, 0.96)]
    rows += [row("attach", p99_ms=0.3), row("zipf", ratio=0.99, failed_requests=1)]
    verdicts = {v["target"].split(",")[0] + str(v["limit"]): (v["found"], v["met"]) for v in results.judge(rows)}
    assert verdicts == {
        "tokens/s with 1 distinct adapters0.95": (0.9, False),
        "tokens/s with 8 distinct adapters0.95": (None, None),
        "tokens/s with 64 distinct adapters0.95": (0.96, True),
        "tokens/s with 1000 distinct adapters0.95": (None, None),
        "cold attach2.0": (0.3, True),
        "Zipf trace0.95": (0.99, True),
        "Zipf trace0": (1, False),
    }


def test_the_tables_name_what_was_not_measured():
    rows = [generated(8, "bfloat16", 100, 1.1), generated(1000, "bfloat16", 1000, 0.95)]
    rows.append(row("generation", provider="PEFT LoRA", adapters=1000, dtype="bfloat16", not_run="why"))
    tables = serving_tables({"rows": rows, "targets": results.judge(rows), "sections": {}})
    assert "| 8 | bfloat16 | 100 | 110 | 1.10 | 1.10 | – |" in tables and "not measured" in tables
    assert "| 1,000 | bfloat16 | 1000 | 950 | 0.95 | 0.95 | not run |" in tables
