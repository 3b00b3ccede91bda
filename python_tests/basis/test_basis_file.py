"""The bases of a model in one file: exact, small where only anchors are kept, and never half believed."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraxs_ext.basis import BasisFile, Factors, Recipe, decompose, make_anchor, sketch, write_basis_file
from loraxs_ext.basis.tensor_file import TensorFile, write_tensors

from .matrices import power_law

RECIPE = Recipe(sigma="sqrt", tol=1e-4)
NAMES = ("layers.0.q", "layers.0.up", "layers.1.q")


def bases(directory: Path, rank: int = 5, **fields: object) -> dict[str, Factors]:
    weights = {
        NAMES[0]: power_law(40, 60, 0.5).float(),
        NAMES[1]: power_law(70, 40, 0.5, seed=3),
        NAMES[2]: power_law(40, 60, 0.5, seed=5).float(),
    }
    recipe = Recipe(**{**RECIPE.to_dict(), **fields})
    return decompose(weights, rank, recipe, cache_dir=directory / "cache", progress=False)


@pytest.fixture
def factors(tmp_path: Path) -> dict[str, Factors]:
    return bases(tmp_path)


@pytest.fixture
def path(tmp_path: Path, factors: dict[str, Factors]) -> Path:
    write_basis_file(tmp_path / "bases.safetensors", RECIPE, factors)
    return tmp_path / "bases.safetensors"


def test_what_is_written_is_read(path: Path, factors: dict[str, Factors]) -> None:
    with BasisFile(path) as file:
        assert file.recipe == RECIPE and file.has_factors and list(file.modules) == list(NAMES)
        for name, expected in factors.items():
            found = file.factors(name)
            assert all(torch.equal(*pair) for pair in zip(found[:3], expected[:3], strict=True))
            assert found.a.dtype == (torch.float64 if name == "layers.0.up" else torch.float32)
            assert found[3:] == expected[3:] and file.modules[name].fingerprint == expected.fingerprint
            assert torch.equal(file.sketch(name), sketch(expected))
            assert torch.equal(file.anchor(name).projections, make_anchor(expected, "sqrt").projections)
            assert torch.equal(file.anchor(name).s, expected.s)
    # Any reader of safetensors can read it.
    assert torch.equal(load_file(path)["layers.0.q.a"], factors["layers.0.q"].a)


def test_anchors_alone_are_small(path: Path, factors: dict[str, Factors], tmp_path: Path) -> None:
    address = write_basis_file(tmp_path / "anchors", RECIPE, factors, anchors_only=True)
    with BasisFile(tmp_path / "anchors") as anchors, BasisFile(path) as full:
        assert not anchors.has_factors and anchors.address != ""
        assert torch.equal(anchors.anchor(NAMES[0]).projections, full.anchor(NAMES[0]).projections)
        assert anchors.address == full.address == address
        with pytest.raises(ValueError, match="holds anchors only"):
            anchors.factors(NAMES[0])
    numbers = sum(4 * 5 * 29 + 4 * 5 * 5 + 5 * (8 if name == NAMES[1] else 4) for name in NAMES)
    with safe_open(tmp_path / "anchors", "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == numbers


def test_the_address_is_that_of_the_content(tmp_path: Path, factors: dict[str, Factors]) -> None:
    def address(recipe: Recipe = RECIPE, **changes: Factors) -> str:
        return write_basis_file(tmp_path / "file", recipe, {**factors, **changes})

    first = address()
    assert first == address() and len(first) == 16
    again = bases(tmp_path / "elsewhere")
    assert write_basis_file(tmp_path / "deep" / "er", RECIPE, again) == first
    assert first != address(Recipe(sigma="sqrt", tol=1e-5))
    assert first != address(**{NAMES[0]: factors[NAMES[0]]._replace(fingerprint="0" * 16)})
    assert first != address(**{NAMES[0]: factors[NAMES[0]].cut(3)})
    assert first != address(**{"another": factors[NAMES[0]]})


def test_names_with_and_without_a_prefix(path: Path) -> None:
    with BasisFile(path) as file:
        assert file.find("layers.0.q") == file.find("model.layers.0.q") == "layers.0.q"
        assert file.find("up") == "layers.0.up" and file.find("0.up") == "layers.0.up"
        assert file.find("q") is None and file.find("rs.0.q") is None and file.find("layers.2.q") is None


def test_factors_without_a_fingerprint_are_refused(tmp_path: Path, factors: dict[str, Factors]) -> None:
    with pytest.raises(ValueError, match=r"factors\['layers.0.q'\] must have the fingerprint"):
        write_basis_file(tmp_path / "file", RECIPE, {NAMES[0]: factors[NAMES[0]]._replace(fingerprint=None)})
    assert not (tmp_path / "file").exists()


# Damage: what the header tells


def edit_header(path: Path, change) -> None:
    """Rewrite the JSON header in place, whatever becomes of its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def metadata(field: str, value: str):
    return lambda path: edit_header(path, lambda header: header["__metadata__"].update({field: value}))


def tensor(field: str, value: object):
    return lambda path: edit_header(path, lambda header: header["layers.0.q.a"].update({field: value}))


def rename(path: Path) -> None:
    edit_header(path, lambda header: header.update({"layers.0.q.b": header.pop("layers.0.q.a")}))


def replace(old: bytes, new: bytes):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


HEADER_DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"\x00" * 5),
    "text": lambda path: path.write_text("this is not a file of tensors"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "huge header": lambda path: path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:]),
    "nested header": lambda path: path.write_bytes((40000).to_bytes(8, "little") + b"[" * 40000),
    "list": lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"),
    "foreign": lambda path: save_file({"a": torch.zeros(4, 60)}, path),
    "foreign tensors": lambda path: write_tensors(path, {"a": torch.zeros(4, 60)}, {"format": "pt"}),
    "format": metadata("format", "loraxs_basis_file/0"),
    "recipe": metadata("recipe", json.dumps({**RECIPE.to_dict(), "tol": 1e-5})),
    "recipe nonsense": metadata("recipe", json.dumps({"tol": "small"})),
    "recipe unknown": metadata("recipe", json.dumps({"speed": 3})),
    "modules": metadata("modules", "[1, 2]"),
    "modules nonsense": metadata("modules", json.dumps({"x": ["0", [4, 5], 10**18, "F32", 0.0]})),
    "modules negative": metadata("modules", json.dumps({"x": ["0", [4, -5], 2, "F32", 0.0]})),
    "address": metadata("address", "0" * 16),
    "holds": metadata("holds", "everything"),
    "checksums": metadata("checksums", "[]"),
    "no metadata": lambda path: edit_header(path, lambda header: header.pop("__metadata__")),
    "huge shape": tensor("shape", [10**9, 10**9]),
    "negative shape": tensor("shape", [-5, -60]),
    "wrong shape": tensor("shape", [60, 5]),
    "dtype": tensor("dtype", "I64"),
    "unknown dtype": tensor("dtype", "Q3"),
    "offsets": tensor("data_offsets", [8, 1208]),
    "offsets nonsense": tensor("data_offsets", "all"),
    "renamed": rename,
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE.values(), ids=HEADER_DAMAGE)
def test_damage_is_refused_before_anything_is_read(damage, path: Path) -> None:
    damage(path)
    with pytest.raises(ValueError, match="basis file .*bases.safetensors is damaged, or not a file of bases: "):
        BasisFile(path)


def test_a_flipped_bit_is_found_in_the_tensor_that_it_hit(path: Path) -> None:
    with TensorFile(path) as file:
        position = file._start + file._places["layers.1.q.bt"].begin + 77
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    with BasisFile(path) as file:
        file.factors("layers.0.q")
        file.anchor("layers.1.q")
        with pytest.raises(ValueError, match="checksum of its tensor 'layers.1.q.bt' does not agree"):
            file.factors("layers.1.q")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BasisFile(tmp_path / "nothing")


# Writing


def test_files_get_the_rights_of_the_umask(path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(path.with_name("other"), {"a": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.with_name("other").stat().st_mode) == 0o640


def test_a_failure_leaves_the_old_file_and_nothing_else(
    path: Path, factors: dict[str, Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, around = path.read_bytes(), sorted(path.parent.iterdir())

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    for step in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(step, full)
            write_basis_file(path, RECIPE, {NAMES[0]: factors[NAMES[0]]})
        assert path.read_bytes() == before and sorted(path.parent.iterdir()) == around


def test_an_open_file_is_read_to_its_end_though_it_is_replaced(path: Path, tmp_path: Path) -> None:
    with BasisFile(path) as file:
        expected = file.factors(NAMES[0])
        write_basis_file(path, Recipe(), bases(tmp_path, rank=2, sigma="A", tol=1e-3))
        assert torch.equal(file.factors(NAMES[0]).a, expected.a)
        assert torch.equal(file.anchor(NAMES[2]).s, file.factors(NAMES[2]).s)


def write_again_and_again(path: Path, factors: dict[str, Factors], rank: int, outcome) -> None:
    torch.set_num_threads(1)
    for _ in range(15):
        write_basis_file(path, RECIPE, {name: found.cut(rank) for name, found in factors.items()})
    outcome.put("wrote")


def read_again_and_again(path: Path, factors: dict[str, Factors], outcome) -> None:
    torch.set_num_threads(1)
    for _ in range(40):
        with BasisFile(path) as file:
            for name, expected in factors.items():
                rank = file.modules[name].rank
                assert torch.equal(file.factors(name).a, expected.a[:rank])
    outcome.put("read")


# Python 3.12 warns of every fork beside torch's threads; the children here run one thread only.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_concurrent_writers_and_readers(path: Path, factors: dict[str, Factors]) -> None:
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    processes = [context.Process(target=write_again_and_again, args=(path, factors, rank, outcome)) for rank in (3, 5)]
    processes += [context.Process(target=read_again_and_again, args=(path, factors, outcome)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(outcome.get() for _ in processes) == ["read", "read", "wrote", "wrote"]
    assert not list(path.parent.glob(".*"))
