"""The serving part of gpu_check without a GPU: its rows, and what it takes for wrong."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.gpu import serving
from benchmarks.gpu.clock import CpuClock
from benchmarks.gpu.targets import judge
from loraxs_ext.serve import AdapterPool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "bases"))


def test_rows_of_a_dry_run():
    seen: list[str] = []
    rows = list(serving.measure(CPU, clock=CpuClock(), dry=True, seconds=0.0, begin=seen.append))
    assert seen == ["model", "decode 3", "decode 1", "attach", "trace"]
    assert [row["what"] for row in rows] == ["decode step", "decode step", "attach", "Zipf trace"]
    assert rows[0]["error"] <= serving.TOLERANCE[torch.float32]
    assert rows[-1]["evictions"] > 0 and rows[-1]["failures"] == 0
    assert not {"ratio", "step_us", "tokens_per_second", "p50_us", "p99_us"} & {name for row in rows for name in row}


def test_the_model_is_a_decoder_whose_context_counts():
    scale = serving.dry_scale()
    base, served = serving._models(scale, CPU)
    step = serving.Step(scale, 2, CPU)
    with torch.no_grad():
        (first,), (again,), (other,) = step(base), step(base), step(served)
        assert torch.equal(first, again) and torch.equal(first, other)
        for keys, values in step._context._tensors:
            keys.zero_(), values.zero_()
        assert not torch.allclose(first, step(base)[0])
    assert all(map(torch.equal, base.parameters(), served.parameters()))


class Idle(AdapterPool):
    """Serves the base model whatever the slots say."""

    def slot_buffer(self, tokens):
        return super().slot_buffer(tokens).clone()

    def token_slots(self, slots=None, timeout=None):
        return super().token_slots(torch.full_like(slots, -1), timeout)


class First(AdapterPool):
    """Serves the first row's adapter to all of them."""

    def token_slots(self, slots=None, timeout=None):
        return super().token_slots(slots[:1].expand(len(slots)), timeout)


@pytest.mark.parametrize(("pool_class", "message"), [(Idle, "change nothing"), (First, "errors")])
def test_no_figure_where_adapters_are_ignored_or_mixed_up(monkeypatch, pool_class, message):
    monkeypatch.setattr(serving, "AdapterPool", pool_class)
    with pytest.raises(serving.Wrong, match=message):
        list(serving.measure(CPU, clock=CpuClock(), dry=True, seconds=0.0))


def test_promises_of_a_server():
    def row(what: str, ratio: float) -> dict[str, object]:
        return {"what": what, "ratio": ratio}

    judged = partial(judge, [], None)
    found = {v["target"]: v["met"] for v in judged([row("decode step", 0.97), row("decode step", 0.94)])}
    assert found["a decoder, decode step, time over the base"] is False
    assert found["a decoder, Zipf trace, time over the base"] is None
    (trace,) = (v for v in judged([row("Zipf trace", 1.01)]) if "Zipf" in v["target"])
    assert trace["met"] is True and trace["worst"] == pytest.approx(1 / 1.01)
