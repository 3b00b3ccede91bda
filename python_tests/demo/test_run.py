"""The demo from end to end, in small: it trains, saves, reloads, serves and reports, and it notices what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]


def demo(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.demo", "--quick", "--output", str(output), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=900)
    if result.returncode == 3:
        pytest.skip(f"the demo's packages cannot be downloaded here: {result.stderr.strip()}")
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(output folder, what was printed) of a quick run whose checks all hold."""
    output = tmp_path_factory.mktemp("demo")
    result = demo(output)
    assert result.returncode == 0, result.stdout + result.stderr
    return output, result.stdout


class Page(HTMLParser):
    """Tags of a page, and everything it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.loads.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_results_hold_every_claim(run: tuple[Path, str]) -> None:
    results = json.loads((run[0] / "demo_results.json").read_text())
    assert set(results["tasks"]) == {"movie", "product", "source"}
    assert len(results["checks"]) == 3 + len(results["tasks"])
    assert all(check["holds"] for check in results["checks"])
    assert results["decomposition"]["matrices"] == 36
    assert results["decomposition"]["error"] < 1e-2
    for task in results["tasks"].values():
        ours = task["methods"]["LoRA-XS"]
        assert ours["trainable"] == 36 * 16 * 16
        assert ours["bytes"]["matrices"] == 4 * ours["trainable"]
        assert ours["bytes"]["head"] == 4 * ours["head"] == 4 * (384 + 1) * 4
        assert 0.0 <= ours["score"]["accuracy"] <= 1.0
        assert len(ours["curve"]["dev_accuracy"]) == results["settings"]["epochs"]
        assert len(ours["curve"]["loss"]) == results["settings"]["epochs"] * ours["curve"]["steps_per_epoch"]


def test_mixed_batch_serves_all(run: tuple[Path, str]) -> None:
    served = json.loads((run[0] / "demo_results.json").read_text())["mixed_batch"]
    assert set(served["difference"]) == {"movie", "product", "source", "__base__"}
    assert served["rows"] == 4 * 6
    assert max(served["difference"].values()) <= served["tolerance"] < served["contrast"]
    assert max(served["reload_difference"].values()) <= served["tolerance"]


def test_adapter_files_hold_no_basis(run: tuple[Path, str]) -> None:
    for task in ("movie", "product", "source"):
        tensors = load_file(run[0] / "adapters" / "lora-xs" / task / "adapter_model.safetensors")
        assert sum(tuple(tensor.shape) == (16, 16) for tensor in tensors.values()) == 36
        assert max(tensor.numel() for tensor in tensors.values()) == 4 * 384  # the head


def test_plain_lora_sizes_are_of_saved_files(run: tuple[Path, str]) -> None:
    sizes = json.loads((run[0] / "demo_results.json").read_text())["plain_lora_sizes"]
    assert {name: size["trainable"] for name, size in sizes.items()} == {
        "LoRA r = 8": 331_776,
        "LoRA r = 1": 41_472,
        "LoRA r = 1 on query, value": 9_216,
    }
    for size in sizes.values():
        assert size["bytes"]["file"] > size["bytes"]["matrices"] == 4 * size["trainable"]


def test_page_is_self_contained(run: tuple[Path, str]) -> None:
    text = (run[0] / "demo_report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == []
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    assert "@import" not in text and "url(http" not in text
    assert page.tags.count("figure") == page.tags.count("svg") == page.tags.count("figcaption") == 4
    assert len(page.ids) == len(set(page.ids))


def test_console_has_the_table(run: tuple[Path, str]) -> None:
    for words in ("Movie sentiment", "Product sentiment", "Source of text", "frozen base", "LoRA r = 8", "[5/5]"):
        assert words in run[1]


def test_second_run_trains_nothing_and_notices_a_changed_adapter(run: tuple[Path, str]) -> None:
    output, _ = run
    folder = output / "adapters" / "lora-xs" / "movie"
    path = folder / "adapter_model.safetensors"
    original = path.read_bytes()
    stamps = {task: (output / "adapters/lora-xs" / task / "training.json").stat().st_mtime_ns for task in ("source",)}
    tensors = load_file(path)
    changed = next(name for name, tensor in tensors.items() if tuple(tensor.shape) == (16, 16))
    tensors[changed] = tensors[changed] + 0.5
    save_file(tensors, path)
    try:
        result = demo(output)
    finally:
        path.write_bytes(original)
    assert result.returncode == 1
    assert "FAILED" in result.stderr and "reloaded from disk" in result.stderr
    assert result.stdout.count("in an earlier run") == 3
    assert stamps == {
        task: (output / "adapters/lora-xs" / task / "training.json").stat().st_mtime_ns for task in stamps
    }


def test_help_and_bad_arguments() -> None:
    command = [sys.executable, "-m", "examples.demo"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0 and "--output" in shown.stdout and "--quick" in shown.stdout
    refused = subprocess.run([*command, "--nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "--nonsense" in refused.stderr
