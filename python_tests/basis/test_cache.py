from __future__ import annotations

import multiprocessing
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraxs_ext.basis import Factors, Recipe, decompose, decomposition

from .matrices import gaussian, power_law

W = power_law(40, 60, 0.5).float()


def compute(directory: Path, rank: int = 4, weight: torch.Tensor = W, **fields: object) -> Factors:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return decompose({"w": weight}, rank, Recipe(**fields), cache_dir=directory, progress=False)["w"]


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ranks that were really computed, in order."""
    ranks: list[int] = []
    solve = decomposition.solve

    def counting(stack: torch.Tensor, rank: int, *rest: object) -> object:
        ranks.append(rank)
        return solve(stack, rank, *rest)

    monkeypatch.setattr(decomposition, "solve", counting)
    return ranks


def same(one: Factors, two: Factors) -> bool:
    return one.subspace_error == two.subspace_error and all(
        torch.equal(*pair) for pair in zip(one[:3], two[:3], strict=True)
    )


def test_hit_gives_the_same_bits(tmp_path: Path, computed: list[int]) -> None:
    first = compute(tmp_path)
    assert len(files(tmp_path)) == 1 and files(tmp_path)[0].suffix == ".safetensors"
    assert same(first, compute(tmp_path)) and computed == [4]


def test_a_larger_stored_rank_serves_a_smaller_one(tmp_path: Path, computed: list[int]) -> None:
    large, small = compute(tmp_path, 9), compute(tmp_path, 4)
    assert computed == [9]
    assert all(torch.equal(part[:4], cut) for part, cut in zip(large[:3], small[:3], strict=True))
    assert small.subspace_error <= 1e-3
    compute(tmp_path, 12)
    assert computed == [9, 12]


def test_a_larger_rank_does_not_serve_a_cut_that_it_does_not_resolve(tmp_path: Path, computed: list[int]) -> None:
    sigma = torch.tensor([3.0, 2, 2, 1] + [0.1] * 36)
    weight = torch.diag(sigma)
    compute(tmp_path, 4, weight)
    with pytest.warns(RuntimeWarning, match="cluster"):
        decompose({"w": weight}, 2, cache_dir=tmp_path, progress=False)
    assert computed == [4, 2]


def test_ranks_of_the_reference_are_not_nested(tmp_path: Path, computed: list[int]) -> None:
    for rank in (9, 4, 4):
        compute(tmp_path, rank, svd="reference")
    assert computed == [9, 4]


def test_the_smallest_rank_that_serves_is_read(tmp_path: Path, computed: list[int]) -> None:
    small = compute(tmp_path, 4)
    (path,) = files(tmp_path)
    compute(tmp_path, 9)
    (larger,) = set(files(tmp_path)) - {path}
    truncate(larger)
    # Nothing warns of the larger one, for it is not looked at.
    assert same(small, compute(tmp_path, 4)) and computed == [4, 9]


@pytest.mark.parametrize(
    "fields",
    [{"sigma": "B"}, {"tol": 1e-4}, {"seed": 1}, {"vectors": "middle"}, {"n_oversamples": 3}, {"svd": "exact"}],
)
def test_another_recipe_is_another_entry(fields: dict, tmp_path: Path, computed: list[int]) -> None:
    compute(tmp_path)
    compute(tmp_path, **fields)
    assert computed == [4, 4] and len(files(tmp_path)) == 2


def test_another_weight_or_precision_is_another_entry(tmp_path: Path, computed: list[int]) -> None:
    compute(tmp_path)
    changed = W.clone()
    changed[7, 7] = torch.nextafter(changed[7, 7], torch.tensor(9.0))
    compute(tmp_path, weight=changed)
    found = compute(tmp_path, weight=W.double())
    assert found.a.dtype == torch.float64 and computed == [4, 4, 4]


def test_results_are_stored_before_they_are_rounded(tmp_path: Path) -> None:
    full = compute(tmp_path)
    half = decompose({"w": W}, 4, cache_dir=tmp_path, dtype=torch.bfloat16, progress=False)["w"]
    assert torch.equal(half.a, full.a.bfloat16()) and same(full, compute(tmp_path))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def replace_by_text(path: Path) -> None:
    path.write_text("not a basis")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def claim_a_huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def change_a_shape(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[4,60]', b'"shape":[60,4]'))


def change_the_fingerprint(path: Path) -> None:
    data = path.read_bytes()
    key = path.name[:16].encode()
    path.write_bytes(data.replace(key, key[::-1]))


def foreign_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(4, 60)}, path)


def another_header(path: Path) -> None:
    save_file(load_file(path), path, {"format": "pt"})


def header_that_is_no_object(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


DAMAGE = [
    flip_a_byte,
    truncate,
    replace_by_text,
    empty,
    claim_a_huge_header,
    change_a_shape,
    change_the_fingerprint,
    foreign_safetensors,
    another_header,
    header_that_is_no_object,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_files_are_computed_anew(damage, tmp_path: Path, computed: list[int]) -> None:
    expected = compute(tmp_path)
    path = files(tmp_path)[0]
    damage(path)
    with pytest.warns(RuntimeWarning, match="damaged or foreign"):
        again = decompose({"w": W}, 4, cache_dir=tmp_path, progress=False)["w"]
    assert same(again, expected) and computed == [4, 4]
    assert same(compute(tmp_path), expected) and computed == [4, 4]


def test_unwritable_directory_warns_and_computes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        found = decompose({"w": W}, 4, cache_dir=tmp_path / "file", progress=False)["w"]
    assert same(found, compute(tmp_path))


def test_no_temporary_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.warns(RuntimeWarning, match="disk full"):
        decompose({"w": W}, 4, cache_dir=tmp_path, progress=False)
    assert files(tmp_path) == []


def test_directory_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LORAXS_CACHE", raising=False)
    decompose({"w": W}, 2, cache_dir="default", progress=False)
    assert len(files(tmp_path / "home" / ".cache" / "loraxs_ext")) == 1
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "elsewhere"))
    decompose({"w": W}, 2, cache_dir="default", progress=False)
    assert len(files(tmp_path / "elsewhere")) == 1
    decompose({"w": W}, 2, progress=False)
    assert len(files(tmp_path)) == 2


def test_nan_is_refused_with_a_cache_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'w' contains NaN"):
        compute(tmp_path, weight=torch.full((8, 8), torch.nan))
    assert not tmp_path.exists() or files(tmp_path) == []


def test_an_unconverged_entry_still_warns(tmp_path: Path, computed: list[int]) -> None:
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="cluster"):
            decompose({"w": torch.eye(30)}, 5, cache_dir=tmp_path, progress=False)
    assert computed == [5]


def write_repeatedly(weights: dict[str, torch.Tensor], directory: Path, rank: int, sums: object) -> None:
    torch.set_num_threads(1)
    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = decompose(weights, rank, cache_dir=directory, progress=False)
    sums.put((rank, [float(factors.a.double().sum()) for factors in found.values()]))


# Python 3.12 warns of every fork beside torch's threads; the children here run one thread only.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_concurrent_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    weights = {str(i): gaussian(50, 40, seed=i) for i in range(12)}
    sums = context.SimpleQueue()
    processes = [
        context.Process(target=write_repeatedly, args=(weights, tmp_path, rank, sums)) for rank in (4, 4, 6, 6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    results = [sums.get() for _ in processes]
    for rank in (4, 6):
        one, two = (total for stored, total in results if stored == rank)
        assert one == pytest.approx(two, rel=1e-4)
    assert files(tmp_path) and all(path.suffix == ".safetensors" for path in files(tmp_path))


def test_a_hit_is_much_faster_than_computing(tmp_path: Path) -> None:
    weight = power_law(1100, 1024, 0.25).float()

    def seconds(directory: Path | None) -> float:
        start = time.perf_counter()
        decompose({"w": weight}, 25, cache_dir=directory, progress=False)
        return time.perf_counter() - start

    seconds(tmp_path)
    assert min(seconds(tmp_path) for _ in range(3)) < 0.5 * min(seconds(None) for _ in range(3))
