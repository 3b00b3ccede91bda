"""The report: the README's tables from the files it was written from, and no table without its circumstances."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks._measure import RESULTS, write_json
from benchmarks.report import NotAResult, caption, load, main, markdown, plot

ENVIRONMENT = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "date": "2026-01-02T03:04:05Z",
    "commit": "0123456789abcdef",
}


def gpu_row(M: int, r: int, **ratios: float) -> dict[str, Any]:
    return {
        "kind": "decode", "M": M, "N": 4096, "K": 4096, "r": r, "dtype": "bfloat16", "base": "F.linear",
        "ratio": ratios, "share_of_limit": {name: 0.5 for name in ratios}, "times": {}, "refused": {},
    }  # fmt: skip


@pytest.fixture
def gpu_result() -> dict[str, Any]:
    return {
        "environment": ENVIRONMENT,
        "dry_run": False,
        "ceilings": {"copy_bytes_per_second": 3.0e12, "bf16_flop_per_second": 7.9e14},
        "targets": [
            {"target": "decode", "limit": 1.05, "worst": 1.0412, "met": True},
            {"target": "prefill", "limit": 1.03, "worst": 1.2, "met": False},
            {"target": "training", "limit": 1.08, "worst": None, "met": None},
        ],
        "rows": [gpu_row(1, 16, loraxs=1.01, naive=2.5), gpu_row(64, 16, loraxs=1.04), gpu_row(1, 64, loraxs=1.09)],
        "missing": ["prefill M512 4096->4096 r16"],
    }


def written(folder: Path, result: Any) -> Path:
    path = folder / "some.json"
    write_json(path, result)
    return path


def test_kept_results_can_all_be_reported(capsys):
    names = [path.stem for path in RESULTS.glob("*.json")]
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert names and all(f"### {name}\n" in printed for name in names)


def test_linear_table_holds_the_medians_of_the_file():
    path = RESULTS / "linear-cpu.json"
    rows = json.loads(path.read_text())["rows"]
    (row,) = (r for r in rows if (r["dtype"], r["width"], r["M"], r["r"], r["backward"]) == ("bf16", 384, 8, 16, False))
    (line,) = re.findall(r"\| forward \|.*?(\| bf16, width 384 .*?)\n", markdown("x", load(path)), re.DOTALL)
    columns = [column.strip().split(" / ") for column in line.split("|")[2:-1]]
    assert [column[1] for column in columns] == [f"{ratio:.2f}" for ratio in row["ratio"].values()]


def test_gpu_table(gpu_result, tmp_path):
    text = markdown("gpu-h100", load(written(tmp_path, gpu_result)))
    assert "3.00 TB/s" in text and "790 TFLOP/s" in text
    assert "| decode | 1.05 | 1.041 | met |" in text
    assert "| prefill | 1.03 | 1.2 | **not met** |" in text
    assert "| training | 1.08 | – | not measured |" in text
    assert "| 4096 → 4096, r = 16 | 1.01 / 1.04 | 2.50 / – | 50% / 50% |" in text
    assert "| 4096 → 4096, r = 64 | 1.09 / – | – / – | 50% / – |" in text
    assert "1 planned cells were cut" in text
    assert "NVIDIA H100 80GB HBM3, driver 580.1, torch 2.11.0, triton 3.6.0, 2026-01-02, commit 0123456789*" in text


def test_basis_table(tmp_path):
    both = {"seconds_for_96": {"ours": 2.31, "theirs": 9.9}, "worst_error": {"ours": 1.5e-5, "theirs": 0.59}}
    rows = [
        {"threads": 1, "spectrum": "flat", "rank": 4, **both},
        {"threads": 1, "complete": {"seconds_for_96": 80.0}},
        {"threads": 1, "rank": 64, "matrices": 4, "cache_cold_seconds": 1.5, "cache_warm_seconds": 0.04},
    ]
    result = {"environment": ENVIRONMENT, "matrices": 96, "targets": {"fast": True, "faster": False}, "rows": rows}
    text = markdown("basis_init", load(written(tmp_path, result)))
    assert "| spectrum, rank, threads | ours | theirs |" in text
    assert "| flat, 4, 1 | 2.3 (1.5e-05) | 9.9 (5.9e-01) |" in text
    assert "empty cache 1.50 s, from the cache 0.04 s" in text
    assert "| fast | met |" in text and "| faster | **not met** |" in text


def test_a_kind_that_is_not_known_yet(tmp_path):
    rows = [{"name": "a", "seconds": 1.23456, "times": {"ours": {"median_us": 7.0, "p10_us": 6.0}}}, {"name": "b"}]
    text = markdown("later", load(written(tmp_path, {"environment": ENVIRONMENT, "rows": rows})))
    assert "| name | seconds | times ours |" in text and "| a | 1.235 | 7 |" in text and "| b | – | – |" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.pop("environment"), "environment: expected what the figures were measured on"),
        (lambda result: result["environment"].pop("commit"), "environment: expected commit, got none"),
        (lambda result: result.update(dry_run=True), "dry_run: expected measured rows"),
        (lambda result: result.update(rows=[]), "rows: expected at least one"),
    ],
)
def test_files_without_circumstances_are_refused(gpu_result, tmp_path, capsys, change, message):
    result = json.loads(json.dumps(gpu_result))
    change(result)
    path = written(tmp_path, result)
    with pytest.raises(NotAResult, match=re.escape(message)):
        load(path)
    assert main([str(path)]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_what_is_no_json_is_refused(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"environment":')
    with pytest.raises(NotAResult, match="expected JSON"):
        load(path)


def test_a_figure_says_where_it_was_measured(gpu_result):
    plots = pytest.importorskip("benchmarks._plots", exc_type=ImportError)
    figure = plots.draw(gpu_result["rows"], "some title", caption(gpu_result))
    assert "NVIDIA H100" in figure.get_suptitle() and "commit 0123456789" in figure.get_suptitle()
    assert [axis.get_title() for axis in figure.axes] == ["decode, bfloat16, 4096 → 4096"]
    assert {
        line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 3
    } == {"loraxs": [1.01, 1.09, 1.04]}


def test_plots(gpu_result, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot("gpu-h100", gpu_result, tmp_path / "figures")
    assert sorted(path.name for path in paths) == [f"gpu-h100-r{r}.{kind}" for r in (16, 64) for kind in ("png", "svg")]
    assert all(path.stat().st_size > 1000 for path in paths)
    assert not list((tmp_path / "figures").glob("*.partial"))
    assert plot("plain", {**gpu_result, "rows": [{"r": 4, "seconds": 1.0}]}, tmp_path / "none") == []
