from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from loraxs_ext.basis import Recipe, decompose, decomposition, randomized_svd
from loraxs_ext.basis.streaming import chunk_bytes

from .matrices import defect, gaussian, power_law, spiked, tied


def model() -> dict[str, torch.Tensor]:
    return {
        "q": power_law(64, 64, 0.5).float(),
        "up": power_law(128, 64, 0.5, seed=3).float(),
        "k": power_law(64, 64, 0.3, seed=5).float(),
        "down": power_law(64, 128, 0.5, seed=7).float(),
        "large": spiked(530, 560).float(),
    }


@pytest.mark.parametrize("sigma", ["A", "sqrt", "B"])
def test_placements(sigma: str) -> None:
    weights = model()
    found = decompose(weights, 6, Recipe(sigma=sigma), progress=False)
    assert list(found) == list(weights)
    for name, W in weights.items():
        a, bt, s, error, _ = found[name]
        assert a.shape == (6, W.shape[1]) and bt.shape == (6, W.shape[0]) and bt.is_contiguous() and error <= 1e-3
        assert float((s - torch.linalg.svdvals(W)[:6]).abs().max()) < 1e-5
        if sigma == "A":
            assert defect(bt.mT) < 1e-6
            exact, given = bt.double() @ W.double(), a
        elif sigma == "B":
            assert defect(a.mT) < 1e-6
            exact, given = a.double() @ W.double().mT, bt
        else:
            assert float((torch.linalg.vector_norm(bt, dim=1) - s.sqrt()).abs().max()) < 1e-5
            exact, given = bt.double() @ W.double() / s.double()[:, None], a
        assert float((given - exact).norm() / exact.norm()) < 1e-6
        top = randomized_svd(W, 6)
        assert float((bt.mT @ a - (top.U * top.S) @ top.Vh).abs().max()) < 1e-3


def test_batches_and_ranks_change_no_bit_of_a_weight() -> None:
    weights = model()
    together = decompose(weights, {"q": 3, "up": 4, "k": 3, "down": 9, "large": 5}, progress=False)
    for name in weights:
        rank = len(together[name].s)
        alone = decompose({name: weights[name]}, rank, progress=False)[name]
        assert torch.equal(alone.a, together[name].a) and torch.equal(alone.bt, together[name].bt)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rank", [4, 25])
def test_matrices_iterated_in_step_do_not_know_each_other(rank: int, threads: int) -> None:
    # They converge at different steps, and some are given up and decomposed completely.
    weights = {
        "slow": power_law(600, 640, 0.2).float(),
        "fast": power_law(600, 640, 1.0).float(),
        "tied": tied().float(),
        "spiked": spiked(600, 640).float(),
        "identity": torch.eye(640)[:600],
    }
    assert sum(W.numel() * 4 for W in weights.values()) <= chunk_bytes(torch.device("cpu"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            together = decompose(weights, rank, progress=False)
            alone = {name: decompose({name: W}, rank, progress=False)[name] for name, W in weights.items()}
    finally:
        torch.set_num_threads(before)
    for name, factors in alone.items():
        assert torch.equal(factors.a, together[name].a) and torch.equal(factors.bt, together[name].bt), name


@pytest.mark.parametrize(
    ("compute_device", "together", "most_alive"),
    # One at a time; in chunks of two; in chunks of two of which the next is prepared by a thread: two chunks, and what
    # the thread has just loaded while the one before it is still referenced.
    [(None, 1, 1), (None, 2, 2), ("cpu", 2, 4)],
    ids=["single", "chunks", "prefetched"],
)
def test_loaders_are_called_once_and_their_results_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch, compute_device: str | None, together: int, most_alive: int
) -> None:
    monkeypatch.setattr(decomposition, "chunk_bytes", lambda device: together * 32 * 32 * 4)
    monkeypatch.setattr(decomposition, "_PREFETCH_FOR", {"cpu"})
    alive: dict[int, weakref.ref[np.ndarray]] = {}
    most = 0

    def loader(i: int) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            nonlocal most
            assert list(alive) == list(range(i))
            array = gaussian(32, 32, seed=i).numpy().copy()
            # The array lives as long as any tensor that shares its memory.
            alive[i] = weakref.ref(array)
            most = max(most, sum(ref() is not None for ref in alive.values()))
            return torch.from_numpy(array)

        return load

    found = decompose({str(i): loader(i) for i in range(11)}, 2, compute_device=compute_device, progress=False)
    assert len(found) == len(alive) == 11 and most <= most_alive
    for i in (0, 10):
        plain = decompose({"w": gaussian(32, 32, seed=i)}, 2, progress=False)["w"]
        assert torch.equal(found[str(i)].a, plain.a)


def test_an_error_in_a_prefetched_loader_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "_PREFETCH_FOR", {"cpu"})

    def broken() -> torch.Tensor:
        raise OSError("shard 3 is missing")

    with pytest.raises(OSError, match="shard 3"):
        decompose({"a": gaussian(20, 30), "b": broken, "c": gaussian(20, 30)}, 2, compute_device="cpu", progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_result_dtype_and_device(dtype: torch.dtype) -> None:
    W = gaussian(40, 30)
    found = decompose({"w": W}, 3, dtype=dtype, device="cpu", progress=False)["w"]
    plain = decompose({"w": W}, 3, progress=False)["w"]
    assert found.a.dtype == found.bt.dtype == dtype and plain.a.dtype == torch.float32
    assert torch.equal(found.a, plain.a.to(dtype))
    assert decompose({"w": W.to(dtype)}, 3, progress=False)["w"].a.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def test_extreme_scales() -> None:
    W = gaussian(40, 30)
    for sigma in ("A", "sqrt", "B"):
        plain = decompose({"w": W}, 4, Recipe(sigma=sigma), progress=False)["w"]
        for exponent in (-100, 100):
            scaled = decompose({"w": W * 2.0**exponent}, 4, Recipe(sigma=sigma), progress=False)["w"]
            product = (scaled.bt.double().mT @ scaled.a.double()) * 2.0**-exponent
            assert float((product - plain.bt.double().mT @ plain.a.double()).abs().max()) < 1e-5


def test_factors_own_their_memory(tmp_path: Path) -> None:
    weights = {str(i): gaussian(30, 20, seed=i) for i in range(4)}
    for rank in (5, 3, 3):
        for factors in decompose(weights, rank, cache_dir=tmp_path, progress=False).values():
            for part in factors[:3]:
                assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_parameters_give_plain_factors() -> None:
    found = decompose({"w": torch.nn.Parameter(gaussian(20, 30))}, 2, progress=False)["w"]
    assert not found.a.requires_grad and not found.bt.requires_grad


def test_bad_weights_are_named() -> None:
    good = gaussian(20, 30)
    bad = good.clone()
    bad[3, 4] = torch.nan
    with pytest.raises(ValueError, match="weight 'encoder.layer.0.query' contains NaN"):
        decompose({"a": good, "encoder.layer.0.query": bad, "c": good}, 2, progress=False)
    with pytest.raises(ValueError, match="weight 'b' contains Inf"):
        decompose({"a": good, "b": torch.full((20, 30), torch.inf)}, 2, progress=False)
    with pytest.raises(ValueError, match=r"rank of weight 'a'.*20.*got 21"):
        decompose({"a": good}, 21, progress=False)
    with pytest.raises(TypeError, match=r"weight 'a' must be fp32.*int8"):
        decompose({"a": good.to(torch.int8)}, 2, progress=False)
    with pytest.raises(ValueError, match=r"weight 'a' must be a matrix.*\(2, 20, 30\)"):
        decompose({"a": torch.zeros(2, 20, 30)}, 2, progress=False)
    with pytest.raises(KeyError, match="b"):
        decompose({"a": good, "b": good}, {"a": 2}, progress=False)


def test_unconverged_weights_are_warned_of_together() -> None:
    with pytest.warns(RuntimeWarning, match="2 of 3 weights miss.*'(x|z)' most") as caught:
        decompose({"x": tied(), "y": gaussian(60, 50), "z": tied().mT}, 25, progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_no_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decompose({}, 4, progress=False) == {}


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"q": gaussian(20, 30), "k": gaussian(20, 30)}
    decompose(weights, 2)
    assert "basis" in capsys.readouterr().err
    decompose(weights, 2, progress=False)
    decompose({"q": weights["q"]}, 2)
    assert capsys.readouterr().err == ""
