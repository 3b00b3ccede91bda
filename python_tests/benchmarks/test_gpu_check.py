"""gpu_check without a GPU: the dry run walks every stage, worker and provider, and broken workers are survived."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark.expression import Expression

from benchmarks.gpu import collect, owners
from benchmarks.gpu.cells import KINDS, Cell, dry_plan, plan
from benchmarks.gpu.check import Wrong, assert_right, poison_allocator
from benchmarks.gpu.clock import CpuClock
from benchmarks.gpu.data import make_inputs, make_layer
from benchmarks.gpu.limits import Ceilings, base_work, lora_work, loraxs_work
from benchmarks.gpu.measure import measure, providers_of
from benchmarks.gpu.memory import measure_memory
from benchmarks.gpu.peers import GATHERED, GatheredLora
from benchmarks.gpu.providers import LORAXS, LoraXS
from benchmarks.gpu.stages import Deadline, _parts, run
from benchmarks.gpu.targets import TARGETS, judge

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def call(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu_check.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@needs_no_gpu
def test_without_a_device_it_says_so_in_one_sentence():
    result = call()
    assert result.returncode == 2 and result.stdout == ""
    # Packages that PEFT imports where they are installed may have had something to say before.
    assert result.stderr.strip().splitlines()[-1] == (
        "gpu_check: torch finds no CUDA device here; --dry-run walks the code without one."
    )


@pytest.mark.slow
def test_dry_run_walks_everything_and_records_no_figure(tmp_path):
    result = call("--dry-run", "--output", str(tmp_path), "--cell-seconds", "0.01")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert found["dry_run"] and found["environment"]["device"] and not found["ceilings"] and not found["targets"]
    assert {name: sorted(stage) for name, stage in found["stages"].items()} == {
        "build": ["outcome", "seconds"],
        "tests": ["graphs"],
        "sanitizer": ["walked"],
    }
    assert [row["kind"] for row in found["rows"]] == list(KINDS)
    assert found["failures"] == [] and found["missing"] == [] and found["basis"]
    assert [row["what"] for row in found["serving"]] == ["decode step", "decode step", "attach", "Zipf trace"]
    assert not {"ratio", "tokens_per_second", "p50_us"} & {name for row in found["serving"] for name in row}
    for row in found["rows"]:
        assert row["failed"] == {} and "times" not in row and "ratio" not in row
        assert {"F.linear", "loraxs"} <= set(row["errors"])
    if _installed("triton"):
        assert all("loraxs Triton" in row["errors"] for row in found["rows"][:3])
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-dry-run.json"]


def _installed(owner: str) -> bool:
    try:
        __import__(owner)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("cell", dry_plan(), ids=lambda cell: cell.kind)
def test_every_provider_passes_or_says_why_not(cell):
    row = measure(cell, CpuClock(), Ceilings(1e9, 1e12), CPU, seconds=0.0, excluded=triton_needs_a_gpu(cell))
    names = set(providers_of(cell))
    assert set(row["errors"]) | set(row["refused"]) | set(row["failed"]) == names
    assert all("broke" in reason for reason in row["failed"].values())
    assert row["base"] in row["times"] and set(row["times"]) == set(row["errors"]) == set(row["share_of_limit"])


def triton_needs_a_gpu(cell: Cell) -> list[str]:
    other = (owners.TRITON, owners.TRITON_CUBLAS, owners.CONCATENATED)
    return [f"{cell.kind}:loraxs {name}" for name in other]


class HalfRight(LoraXS):
    def __call__(self) -> tuple[torch.Tensor, ...]:
        (y,) = super().__call__()
        return (torch.where(torch.arange(y.shape[1]) == 3, y * 1.01, y),)


class Raising(LoraXS):
    def __call__(self) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no kernel image\nand more")


def test_no_figure_for_a_wrong_result_nor_for_an_error(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.measure.LORAXS", {**LORAXS, "wrong": HalfRight, "raising": Raising})
    cell = dry_plan(("decode",))[0]
    row = measure(cell, CpuClock(), Ceilings(1e9, 1e12), CPU, seconds=0.0, excluded=triton_needs_a_gpu(cell))
    assert row["failed"]["wrong"].startswith("Wrong: y: error")
    assert row["failed"]["raising"] == "RuntimeError: no kernel image"
    assert not {"wrong", "raising"} & (set(row["times"]) | set(row["ratio"]))


def test_the_rule():
    exact = torch.randn(64, 64, dtype=torch.float64)
    plain = exact.bfloat16()
    assert_right([plain], [plain], [exact])
    for wrong, message in ((plain * 1.05, "exceeds twice"), (plain[:32], "shape"), (plain / 0, "not finite")):
        with pytest.raises(Wrong, match=message):
            assert_right([wrong], [plain], [exact])


def test_what_nobody_writes_is_nan():
    poison_allocator(CPU, megabytes=1)
    # malloc does not say which memory it hands out first.
    taken = [torch.empty(4096) for _ in range(256)]
    assert any(torch.isnan(memory).any() for memory in taken)


def test_plan_puts_what_targets_name_first():
    cells = plan()
    assert len(cells) == len(set(cells))
    named = [any(target.applies(cell.to_dict()) for target in TARGETS) for cell in cells[:22]]
    assert sum(named) >= 20
    for M in (1, 8, 32, 64, 128, 256):
        for r in (4, 16, 64):
            assert sum((c.kind, c.M, c.r, c.adapters) == ("decode", M, r, M) for c in cells) == 4
    for kind in ("prefill", "training"):
        assert {(c.M, c.r) for c in cells if c.kind == kind} == {
            (M, r) for M in (512, 4096, 16384) for r in (4, 16, 64)
        }
    assert all(cell.weight_sets >= 8 for cell in cells if cell.kind == "decode")


def test_work_is_that_of_the_model():
    cell = Cell("decode", 64, 4096, 4096, 16)
    us = {name: work.seconds(Ceilings(3.0e12, 790e12)) * 1e6 for name, work in (
        ("base", base_work(cell)), ("loraxs", loraxs_work(cell)), ("lora", lora_work(cell, 64)),
    )}  # fmt: skip
    assert us == pytest.approx({"base": 11.53, "loraxs": 11.63, "lora": 17.13}, abs=0.01)


def test_gathered_lora_is_what_it_says():
    cell = dry_plan(("decode",))[0]
    inputs = make_inputs(cell, CPU)
    provider = GatheredLora(cell, make_layer(cell, CPU), inputs)
    (y,) = provider()
    m = 2
    expected = provider.layer.weight @ inputs.x[m] + 0.5 * provider.B[m] @ (provider.A[m] @ inputs.x[m])
    torch.testing.assert_close(y[m], expected)


def test_memory_saved_for_backward_is_p():
    row = measure_memory(Cell("training", 32, 48, 40, 4, "float32"), CPU)
    assert row["saved_bytes"]["loraxs"] == row["expected_bytes"] == 4 * 32 * 4
    assert row["saved_bytes"]["PEFT LoRA"] == row["x_bytes"] + 4 * 32 * 4


def decode_row(M: int, K: int, N: int, r: int, **ratios: float) -> dict[str, Any]:
    return {**Cell("decode", M, N, K, r).to_dict(), "base": "F.linear", "ratio": ratios, "times": {}}


def test_targets_are_met_only_when_everything_they_name_was_measured():
    wanted = [c for c in plan() if c.kind == "decode" and c.r == 16 and c.M <= 64]
    rows = [decode_row(c.M, c.K, c.N, c.r, loraxs=1.04, **{"loraxs Triton": 1.01}) for c in wanted]
    first = judge(rows, None)[0]
    assert first["met"] is True and first["worst"] == 1.04 and first["by_owner"]["loraxs Triton"]["worst"] == 1.01
    assert judge(rows[1:], None)[0]["met"] is None
    rows[-1]["ratio"]["loraxs"] = 1.06
    assert judge(rows, None)[0]["met"] is False
    assert judge([], None)[0]["met"] is None and judge([], None)[-1]["met"] is None


def test_the_target_against_gathered_lora_takes_the_fastest_of_them():
    row = decode_row(64, 4096, 4096, 16, loraxs=1.0)
    times = {"loraxs": 10.0, **dict(zip(GATHERED, (30.0, 8.0, 40.0), strict=True))}
    row["times"] = {name: {"median_us": value} for name, value in times.items()}
    (verdict,) = (v for v in judge([row], None) if "gathered" in v["target"])
    assert verdict["worst"] == 10.0 / 8.0 and verdict["met"] is False


WORKER = """
import json, os, sys, time
arguments = sys.argv[1:]
first = int(arguments[arguments.index("--first") + 1])
excluded = arguments[arguments.index("--exclude") + 1:]
def tell(**event): print(json.dumps(event), flush=True)
tell(event="plan", cells=["a", "b", "c"])
tell(event="environment", environment={"device": "fake", "commit": None})
tell(event="begin", cell=-1, provider="ceilings")
for cell in range(first, 3):
    for provider in ("good", "bad"):
        if f"decode:{provider}" in excluded:
            continue
        tell(event="begin", cell=cell, kind="decode", provider=provider)
        if provider == "bad" and cell == 1:
            FAULT
    tell(event="row", cell=cell, row={"kind": "decode", "failed": {}})
tell(event="end")
"""


@pytest.mark.parametrize("fault", ["os.abort()", "time.sleep(60)", "sys.exit('illegal access')"])
def test_a_worker_that_breaks_is_started_again_without_the_culprit(tmp_path, monkeypatch, fault):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.replace("FAULT", fault))
    monkeypatch.setattr(collect, "WORKER", [sys.executable, str(worker)])
    monkeypatch.setattr(collect, "SILENCE_SECONDS", 2.0)
    collector = collect.Collector(tmp_path / "x.json", Deadline(60), commit="abc", is_dry=False)
    monkeypatch.setattr(collect, "judge", lambda *_: [])
    collector.measure(("decode",), 0.1, time.time() + 50)
    result = json.loads((tmp_path / "x.json").read_text())
    assert len(result["rows"]) == 3 and result["missing"] == []
    (failure,) = result["failures"]
    assert (failure["cell"], failure["provider"]) == (1, "bad") and failure["fault"]
    assert result["environment"]["commit"] == "abc" and not collector.clean()


def test_at_the_deadline_what_is_missing_is_listed(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.replace("FAULT", "time.sleep(60)"))
    monkeypatch.setattr(collect, "WORKER", [sys.executable, str(worker)])
    monkeypatch.setattr(collect, "judge", lambda *_: [])
    start = time.monotonic()
    collector = collect.Collector(tmp_path / "x.json", Deadline(3), commit=None, is_dry=False)
    collector.measure(("decode",), 0.1, time.time() + 2)
    assert time.monotonic() - start < 10
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["missing"] == ["b", "c"] and len(result["rows"]) == 1


def test_parts_of_the_error_rule_are_disjoint_and_complete():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider"]
    command += ["python_tests/gpu/test_error_rule.py"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    names = [line.lower() for line in output.splitlines() if "::" in line]
    assert len(names) > 100
    expressions = [Expression.compile(part.arguments[2]) for name, part in _parts().items() if ", " in name]
    taken = [sum(e.evaluate(lambda word, name=name: word.lower() in name) for e in expressions) for name in names]
    assert set(taken) == {1} and len(expressions) == 6


def test_stages_have_an_outcome():
    assert run([sys.executable, "-c", "pass"], 60)["outcome"] == "passed"
    failed = run([sys.executable, "-c", "print('why'); raise SystemExit(4)"], 60)
    assert (failed["outcome"], failed["exit_code"]) == ("failed", 4) and "why" in failed["output_tail"]
    late = run([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"], 3)
    assert late["outcome"] == "timeout" and "here" in late["output_tail"]
