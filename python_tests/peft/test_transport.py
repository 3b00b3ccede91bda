"""A basis that differs from the one R was trained on is turned back into it, through its anchors or a basis file."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import loraxs_ext.peft.bases as bases
from loraxs_ext import basis
from loraxs_ext.basis import BasisFile, Recipe, write_basis_file
from loraxs_ext.peft import LoraXSConfig, verify
from loraxs_ext.peft.transport import Source, restore
from loraxs_ext.peft.verify import Mismatch

from .models import Case, layers_of

SIGMAS = ("A", "sqrt", "B")
placements = pytest.mark.parametrize("sigma", SIGMAS)


class Net(nn.Module):
    """Two wide layers whose 4th and 5th singular values, and others, nearly coincide: a cut there is fragile."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(96, 120, bias=False), nn.Linear(120, 80, bias=False)
        for layer in (self.first, self.second):
            with torch.no_grad():
                noise = torch.randn(layer.weight.shape, generator=generator)
                u, s, vh = torch.linalg.svd(noise, full_matrices=False)
                s[:12] = torch.tensor([9, 6.004, 6.002, 6, 4.004, 4.002, 4, 3.9, 3.004, 3.002, 3, 2.9]) * 10
                layer.weight.copy_((u * s) @ vh / 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(model: nn.Module, **fields) -> PeftModel:
    options = {"r": 6, "target_modules": ["first", "second"], "init_weights": False, **fields}
    return get_peft_model(model, LoraXSConfig(**options)).eval()


def rounded(model: nn.Module, step: float | None = None) -> nn.Module:
    """The model in bf16 precision, or rounded to multiples of `step` times the largest entry of a row."""
    with torch.no_grad():
        for weight in model.parameters():
            if step is None:
                weight.copy_(weight.bfloat16())
            else:
                unit = weight.abs().amax(1, keepdim=True) * step
                weight.copy_((weight / unit).round() * unit)
    return model


def deltas(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    return [layer.get_delta_weight(adapter).detach() for layer in layers_of(model)]


def distance(model: nn.Module, expected: list[Tensor], adapter: str = "default") -> float:
    """Largest relative error of ΔW."""
    pairs = zip(deltas(model, adapter), expected, strict=True)
    return max(float((mine - old).norm() / old.norm()) for mine, old in pairs)


def forget_anchors() -> None:
    for path in (Path(bases.anchors_path({}, Recipe())).parent).glob("*"):
        path.unlink()


@pytest.fixture(params=SIGMAS)
def saved(request, tmp_path: Path) -> tuple[Path, list[Tensor]]:
    """An adapter on disk, and its ΔW."""
    model = adapted(Net(), sigma=request.param)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", deltas(model)


def turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on singular vectors of nearly equal value come as other mixtures, as from another algorithm."""
    decompose = basis.decompose
    mix = torch.eye(22)
    mix[1:4, 1:4] = parametrizations.orthogonal(nn.Linear(3, 3)).weight.detach()
    mix[4:7, 4:7] = parametrizations.orthogonal(nn.Linear(3, 3)).weight.detach()

    def other(weights, ranks, recipe=None, **options):
        result = decompose(weights, 22, recipe, **options)
        for name, found in result.items():
            rank = ranks if isinstance(ranks, int) else ranks[name]
            if recipe.sigma == "sqrt":
                root = found.s.sqrt()[:, None]
                a, bt = (mix @ (found.a * root)) / root, (mix @ (found.bt / root)) * root
            else:
                a, bt = mix @ found.a, mix @ found.bt
            result[name] = found._replace(a=a, bt=bt).cut(rank)
        return result

    monkeypatch.setattr(basis, "decompose", other)


def test_another_algorithm_on_the_same_weights(saved, monkeypatch):
    path, expected = saved
    turned(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA-XS")
        model = PeftModel.from_pretrained(Net(), path)
    assert distance(model, expected) < 2e-5
    # Without the anchors the same basis is refused: the mixture changes what R means.
    forget_anchors()
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(Net(), path)


def test_bf16_weights_warn_and_keep_the_meaning(saved):
    path, expected = saved
    with pytest.warns(
        UserWarning, match=r"another precision by a residual of 0\.00\d+, accepted up to 0\.01;.*error 0\.0"
    ):
        model = PeftModel.from_pretrained(rounded(Net()), path)
    assert distance(model, expected) < 2e-2
    forget_anchors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="another base model"):
            PeftModel.from_pretrained(rounded(Net()), path)


def test_quantised_weights_are_refused_unless_forced(saved):
    path, expected = saved
    message = r"the model quantised, or fine-tuned by a residual of 0\.0\d+, accepted up to 0\.01"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(rounded(Net(), 0.15), path)
    forced = LoraXSConfig.from_pretrained(path)
    forced.basis_check = "warn"
    with pytest.warns(UserWarning, match=message):
        model = PeftModel.from_pretrained(rounded(Net(), 0.15), path, config=forced)
    assert distance(model, expected) < 0.5


def test_a_wrong_base_is_refused(saved):
    with pytest.raises(ValueError, match=r"another base model by a residual of 0\.\d+, accepted up to 0\.01"):
        PeftModel.from_pretrained(Net(seed=1), saved[0])


@placements
def test_beside_another_adapter_r_moves_and_nothing_else(sigma, tmp_path, monkeypatch):
    """The space of 7 vectors is the same, whatever vectors span it."""
    old = adapted(Net(), sigma=sigma, r=7)
    old.save_pretrained(tmp_path)
    turned(monkeypatch)
    model = adapted(Net(), sigma=sigma, r=7, init_seed=1)
    before = deltas(model)
    basis_before = [layer.loraxs_A.clone() for layer in layers_of(model)]
    model.load_adapter(tmp_path, "old")
    assert distance(model, deltas(old), "old") < 1e-3
    assert not torch.equal(layers_of(model)[0].get_R("old"), layers_of(old)[0].get_R("default"))
    assert all(torch.equal(a, b) for a, b in zip(deltas(model), before, strict=True))
    assert all(torch.equal(m.loraxs_A, a) for m, a in zip(layers_of(model), basis_before, strict=True))


def test_beside_another_adapter_of_another_space_it_is_refused(saved, monkeypatch):
    """6 vectors cut through a cluster, and R alone cannot leave the space that the other adapter stands on."""
    path, _ = saved
    turned(monkeypatch)
    model = adapted(Net(), sigma=LoraXSConfig.from_pretrained(path).sigma)
    with pytest.raises(ValueError, match=r"the same weights by a residual of .*e-08, .*: error 0\.2\d+, accepted"):
        model.load_adapter(path, "old")


def test_an_adapter_saved_again_is_found_again(saved, tmp_path):
    """Each base an adapter is saved on has anchors of its own."""
    path, expected = saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(rounded(Net()), path)
        model.save_pretrained(tmp_path / "again")
        back = PeftModel.from_pretrained(Net(), tmp_path / "again")
    assert distance(back, expected) < 2e-2


def test_anchors_are_kept_once_for_all_adapters_of_a_base(tmp_path):
    model = adapted(Net())
    folder = bases.anchors_path({}, Recipe()).parent
    (first,) = folder.iterdir()
    before = first.stat()
    model.add_adapter("second", LoraXSConfig(r=6, target_modules=["first", "second"], init_seed=5))
    adapted(Net())
    assert list(folder.iterdir()) == [first] and first.stat().st_mtime_ns == before.st_mtime_ns
    with BasisFile(first) as file:
        assert not file.has_factors and set(file.modules) == {"first", "second"}
        assert file.modules["first"].fingerprint == basis.fingerprint(Net().first.weight)


def test_damaged_anchors_are_not_used(saved):
    path, _ = saved
    for file in bases.anchors_path({}, Recipe()).parent.iterdir():
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match="another base model"):
        warnings.simplefilter("always")
        PeftModel.from_pretrained(rounded(Net()), path)
    assert any("cached anchors are not used" in str(w.message) for w in caught)


# Basis files


def file_of(model: nn.Module, path: Path, recipe: Recipe | None = None, rank: int = 6, **options) -> Path:
    recipe = recipe or Recipe()
    weights = {name: layer.weight for name, layer in model.named_children()}
    factors = basis.decompose(weights, rank, recipe, cache_dir=path.parent / "cache", progress=False)
    write_basis_file(path, recipe, factors, **options)
    return path


@placements
def test_bases_come_from_the_file_without_an_svd(sigma, tmp_path, monkeypatch):
    recipe = Recipe(sigma=sigma)
    path = file_of(Net(), tmp_path / "net.safetensors", recipe)
    monkeypatch.setattr(basis, "decompose", None)
    model = adapted(Net(), sigma=sigma, basis_file=str(path))
    with BasisFile(path) as file:
        for layer in layers_of(model):
            assert torch.equal(layer.loraxs_A, file.factors(layer.key).a)
            assert torch.equal(layer.loraxs_Bt, file.factors(layer.key).bt)
    # On rounded weights the update is still the same, bit for bit.
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="another precision by a residual of 0.00"):
        other = PeftModel.from_pretrained(rounded(Net()), tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(deltas(model), deltas(other), strict=True))


def test_a_file_of_another_base_is_refused_and_leaves_nothing(tmp_path):
    path = file_of(Net(seed=1), tmp_path / "net.safetensors")
    base = Net()
    with pytest.raises(ValueError, match=r"2 of 2 modules do not match \(another base model by a residual of [\d.]+"):
        adapted(base, basis_file=str(path))
    assert all(layer.basis_rank == 0 for layer in layers_of(base))
    with pytest.raises(ValueError, match="quantised, or fine-tuned"):
        adapted(rounded(Net(), 0.15), basis_file=str(file_of(Net(), tmp_path / "right.safetensors")))


def test_anchors_on_another_machine(saved, tmp_path, monkeypatch):
    """The cache is empty there, but the file of anchors was shipped."""
    path, expected = saved
    sigma = LoraXSConfig.from_pretrained(path).sigma
    anchors = file_of(Net(), tmp_path / "anchors.safetensors", Recipe(sigma=sigma), anchors_only=True)
    forget_anchors()
    turned(monkeypatch)
    config = LoraXSConfig.from_pretrained(path)
    config.basis_file = str(anchors)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA-XS")
        model = PeftModel.from_pretrained(Net(), path, config=config)
    assert distance(model, expected) < 2e-5


def test_anchors_of_another_basis_or_shape_are_left_alone(tmp_path):
    path = file_of(Net(), tmp_path / "anchors.safetensors", anchors_only=True)
    weights = {name: layer.weight.detach() for name, layer in Net().named_children()}
    mine = basis.decompose(weights, 6, Recipe(), cache_dir=None, progress=False)
    sketches = {name: basis.sketch(factors) for name, factors in mine.items()}
    with BasisFile(path) as file:
        sources = {name: Source(tuple(w.shape), lambda w=w: w) for name, w in weights.items()}
        assert restore(file, sketches, sources, Recipe()).keys() == {"first", "second"}
        # `second` turns up transposed, `first` with the sketch of another weight.
        sources["second"] = Source((120, 80), lambda: weights["second"].mT)
        sketches["first"] = basis.sketch(mine["second"])
        assert restore(file, sketches, sources, Recipe()) == {}


def test_a_larger_rank_than_the_file_has_is_grown(tmp_path):
    path = file_of(Net(), tmp_path / "net.safetensors")
    model = adapted(Net(), r=9, basis_file=str(path))
    with BasisFile(path) as file:
        for layer in layers_of(model):
            assert layer.basis_rank == 9 and torch.equal(layer.loraxs_A[:6], file.factors(layer.key).a)


def test_files_that_do_not_fit_are_named(tmp_path):
    path = file_of(Net(), tmp_path / "net.safetensors", Recipe(tol=1e-4), rank=4)
    with pytest.raises(
        ValueError, match=r"basis_file: expected bases made by Recipe.*tol=0.001.* made by .*tol=0.0001"
    ):
        adapted(Net(), basis_file=str(path))
    with pytest.warns(UserWarning, match="basis_file: expected a file of bases, got '/nowhere'"):
        adapted(Net(), basis_file="/nowhere")
    (tmp_path / "text").write_text("not a basis file at all")
    with pytest.raises(ValueError, match="text is damaged, or not a file of bases"):
        adapted(Net(), basis_file=str(tmp_path / "text"))
    small = Net()
    small.second = nn.Linear(120, 40)
    with pytest.raises(ValueError, match=r"for shape \(40, 120\), got .* for \(80, 120\)"):
        adapted(small, basis_file=str(file_of(Net(), tmp_path / "net2.safetensors")))


def test_modules_that_the_file_lacks_are_computed_and_named(tmp_path):
    recipe = Recipe()
    factors = basis.decompose({"first": Net().first.weight}, 6, recipe, cache_dir=tmp_path, progress=False)
    write_basis_file(tmp_path / "part", recipe, factors)
    with pytest.warns(UserWarning, match="expected bases of 2 modules, .* without 1 of them, such as second"):
        model = adapted(Net(), basis_file=str(tmp_path / "part"))
    assert [layer.basis_rank for layer in layers_of(model)] == [6, 6]


def test_loaded_models_use_what_their_processes_cached(llama: Case, tmp_path):
    """Through transformers, with several layers of a real architecture in bf16."""
    model = llama.model()
    model.save_pretrained(tmp_path)
    half = llama.base(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="differ slightly"):
        loaded = PeftModel.from_pretrained(half, tmp_path)
    assert distance(loaded.float(), deltas(model)) < 3e-2


@pytest.mark.parametrize(
    "residual, error, outcome",
    [
        (9e-6, 1e-4, "pass"),
        (9e-6, 5e-2, "warn"),
        (2e-5, 1e-4, "warn"),
        (9e-3, 5e-2, "warn"),
        (2e-2, 5e-2, "raise"),
        (5e-4, 0.2, "raise"),
        (0.3, 1e-4, "raise"),
        (float("nan"), 1e-4, "raise"),
    ],
)
def test_bounds(residual, error, outcome):
    def judge(check: str = "error", tol: float = 0.1) -> None:
        verify.report("x", [Mismatch("m", error, residual), Mismatch("n", 0.0)], check, tol, 1e-3)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if outcome == "raise":
            with pytest.raises(ValueError, match=r"residual of \S+, accepted up to 0.01; worst module m: error"):
                judge()
            with pytest.raises(UserWarning, match="residual of"):
                judge("warn")
        elif outcome == "warn":
            with pytest.raises(UserWarning, match="differ slightly.*residual of"):
                judge()
            if residual > 1e-5:
                with pytest.raises(ValueError, match="accepted up to 1e-0[5-7]"):
                    judge(tol=1e-5 if residual < 1e-4 else 1e-4)
        else:
            judge()
        judge("ignore")
