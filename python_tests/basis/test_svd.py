from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loraxs_ext.basis import SVD, chebyshev, randomized_svd
from loraxs_ext.basis.precision import reduced_precision
from loraxs_ext.basis.recipe import Recipe
from loraxs_ext.basis.solver import choose_method

from ..precision import restored_precision
from .matrices import CASES, defect, gaussian, power_law, spiked, subspace_sine, tied, with_spectrum

# Both iterations on every machine, whichever its devices would choose.
METHODS = ["block_lanczos", "chebyshev"]


@contextlib.contextmanager
def unconverged_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def check_properties(W: Tensor, found: SVD, fp64: bool) -> None:
    """Orthonormal factors, A = UᵀW, singular values and captured energy of any truncated SVD."""
    rank = found.S.shape[-1]
    orthonormal = 1e-12 if fp64 else 1e-6
    assert defect(found.U) < orthonormal and defect(found.Vh.mT) < orthonormal
    assert torch.isfinite(found.U).all() and torch.isfinite(found.S).all() and torch.isfinite(found.Vh).all()
    scale = W.double().abs().max().clamp_min(1e-300)
    W, S = W.double() / scale, found.S.double() / scale
    true = torch.linalg.svdvals(W)
    largest = true[0].clamp_min(1e-300)
    assert (S - true[:rank]).abs().max() <= (1e-12 if fp64 else 5e-6) * largest
    projected = found.U.double().mT @ W
    assert (projected - S[:, None] * found.Vh.double()).abs().max() <= (1e-9 if fp64 else 1e-6) * largest
    captured = projected.square().sum()
    assert captured >= true[:rank].square().sum() * (1 - 1e-6)
    gram = projected @ projected.mT
    assert (gram - gram.diagonal().diag()).abs().max() <= 1e-6 * largest**2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_properties(name: str, dtype: torch.dtype, method: str) -> None:
    W = CASES[name]().to(dtype)
    with unconverged_allowed():
        found = randomized_svd(W, 16, tol=1e-6 if dtype == torch.float64 else 1e-3, method=method)
    assert found.U.dtype == found.S.dtype == found.Vh.dtype == dtype
    check_properties(W, found, dtype == torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scales_of_large_matrices(scale: float, method: str) -> None:
    W = (power_law(600, 640, 0.5) * scale).float()
    found = randomized_svd(W, 8, method=method)
    check_properties(W, found, False)
    assert subspace_sine(found.U, W, 8) < 1e-3


@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1e-20, 1e20, 1e36])
def test_scales(scale: float) -> None:
    W = gaussian(60, 40) * scale
    found = randomized_svd(W, 6)
    # Singular values that are subnormal themselves are rounded like everything there.
    if scale > 1e-40:
        check_properties(W, found, False)
    assert defect(found.U) < 1e-6 and defect(found.Vh.mT) < 1e-6 and found.S[0] > 0
    assert subspace_sine(found.U, W, 6) < 1e-5


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**60])
def test_power_of_two_scales_change_no_bit_of_the_vectors(scale: float) -> None:
    W = power_law(600, 640, 0.5).float()
    plain, scaled = randomized_svd(W, 8), randomized_svd(W * scale, 8)
    assert (
        torch.equal(plain.U, scaled.U) and torch.equal(plain.Vh, scaled.Vh) and torch.equal(plain.S * scale, scaled.S)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_types_are_decomposed_as_they_are(dtype: torch.dtype) -> None:
    W = power_law(600, 530, 0.5).to(dtype)
    found = randomized_svd(W, 8)
    assert found.U.dtype == torch.float32
    assert torch.equal(found.U, randomized_svd(W.float(), 8).U)
    check_properties(W, found, False)


def test_non_contiguous() -> None:
    W = gaussian(640, 1100)[:, ::2].mT
    check_properties(W, randomized_svd(W, 8), False)


# Rounding of these spectra differs by orders of magnitude: slow decay, fast decay, spikes far above a bulk.
SPECTRA = {
    "power law 1/4": lambda: power_law(768, 640, 0.25),
    "power law 1": lambda: power_law(640, 768, 1.0),
    "exponential": lambda: with_spectrum(640, 640, torch.exp(-torch.arange(640) / 4.0)),
    "spiked": lambda: spiked(640, 640),
    "spike of 1000": lambda: with_spectrum(
        640, 640, torch.cat([torch.tensor([1000.0]), torch.arange(2, 641).double() ** -0.25])
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [4, 25])
@pytest.mark.parametrize("name", SPECTRA)
def test_measured_error_meets_the_tolerance_and_covers_the_true_one(name: str, rank: int, method: str) -> None:
    W = SPECTRA[name]().float()
    found, measured = randomized_svd(W, rank, method=method, diagnostics=True)
    true = subspace_sine(found.U, W, rank)
    assert true <= float(measured.subspace_error) <= 1e-3
    assert float(measured.subspace_error) == float(measured.cut_errors[-1])


def test_every_smaller_cut_has_its_own_error() -> None:
    W = spiked(640, 700).float()
    found, measured = randomized_svd(W, 25, diagnostics=True)
    for cut in (1, 5, 12, 20):
        assert subspace_sine(found.U[:, :cut], W, cut) <= float(measured.cut_errors[cut - 1]) < 1e-2


@pytest.mark.parametrize("method", ["exact", *METHODS])
def test_tight_tolerance_in_fp64(method: str) -> None:
    W = power_law(700, 650, 0.5)
    found, measured = randomized_svd(W, 12, tol=1e-9, method=method, diagnostics=True)
    assert subspace_sine(found.U, W, 12) < 1e-9
    assert int(measured.steps) == 0 if method == "exact" else int(measured.steps) > 0


def test_converged_bases_do_not_depend_on_seed_or_method() -> None:
    W = power_law(640, 640, 0.5)
    one, two = (randomized_svd(W, 12, tol=1e-9, seed=seed) for seed in (0, 1))
    exact, filtered = (randomized_svd(W, 12, tol=1e-9, method=method) for method in ("exact", "chebyshev"))
    assert not torch.equal(one.U, two.U)
    for other in (two, exact, filtered):
        assert float((one.U - other.U).norm() / one.U.norm()) < 1e-7


def test_delta_of_two_independent_computations_agrees() -> None:
    W, R = power_law(640, 700, 0.5), gaussian(12, 12, seed=5).double()

    def delta(found: SVD) -> Tensor:
        return found.U @ R @ (found.S[:, None] * found.Vh)

    one = delta(randomized_svd(W, 12, tol=1e-9))
    two = delta(randomized_svd(W, 12, tol=1e-9, seed=99))
    assert float((one - two).norm() / one.norm()) < 1e-7
    # In fp32, at the default tolerance, what is left is the tolerance.
    single = delta(SVD(*(part.double() for part in randomized_svd(W.float(), 12))))
    assert float((one - single).norm() / one.norm()) < 5e-3


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits(method: str) -> None:
    W = spiked(640, 640).float()
    one, two = (randomized_svd(weight, 8, method=method) for weight in (W, W.clone()))
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


@pytest.mark.parametrize("shape", [(200, 150), (560, 600)], ids=["exact", "lanczos"])
def test_batches(shape: tuple[int, int]) -> None:
    stack = torch.stack([power_law(*shape, 0.25 + 0.1 * i, seed=i).float() for i in range(4)])
    order = torch.tensor([2, 0, 3, 1])
    together, permuted = randomized_svd(stack, 5), randomized_svd(stack[order], 5)
    for i in range(4):
        alone = randomized_svd(stack[i], 5)
        for whole, shuffled, single in zip(together, permuted, alone, strict=True):
            assert torch.equal(shuffled, whole[order])
            assert torch.equal(single, whole[i])


@pytest.mark.parametrize("method", METHODS)
def test_batched_iteration_agrees_with_single_matrices(method: str) -> None:
    """The path of accelerators, which iterate on all matrices at once and drop those that have converged."""
    from loraxs_ext.basis.solver import _solve_iteratively

    stack = torch.stack([power_law(560, 600, e, seed=i).float() for i, e in enumerate((0.25, 1.0, 0.5, 0.3))])
    stack = torch.cat([stack, spiked(560, 600).float()[None]])
    recipe = Recipe()
    together = _solve_iteratively(stack, 6, recipe, method)
    assert len(set(together.steps.tolist())) > 1
    for i in range(len(stack)):
        alone = _solve_iteratively(stack[i : i + 1], 6, recipe, method)
        assert together.steps[i] == alone.steps[0]
        assert float((together.left[i] - alone.left[0]).abs().max()) < 1e-4


@pytest.mark.parametrize("rank", [4, 25])
@pytest.mark.parametrize("name", SPECTRA)
def test_early_filters_may_run_in_reduced_precision(name: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding W to bf16 is coarser than the TF32 that an accelerator would use, and it is corrected."""
    W = SPECTRA[name]().float()[None]
    short = W if W.shape[1] <= W.shape[2] else W.mT
    rounded = short.bfloat16().float()
    coarse, calls = False, 0

    @contextlib.contextmanager
    def reduced(device: torch.device, *, enabled: bool) -> Iterator[None]:
        nonlocal coarse
        coarse = enabled
        yield
        coarse = False

    def apply_gram(rows: Tensor, weights: Tensor) -> Tensor:
        nonlocal calls
        calls += coarse
        return (rows @ rounded) @ rounded.mT if coarse else (rows @ weights) @ weights.mT

    monkeypatch.setattr(chebyshev, "reduced_precision", reduced)
    monkeypatch.setattr(chebyshev, "_apply_gram", apply_gram)
    plain, mixed = (chebyshev.chebyshev_subspace(short, rank, 32, 1e-3, 100, 0, reduced=flag) for flag in (False, True))
    true = torch.linalg.svd(short[0].double(), full_matrices=False).U[:, :rank]
    for found in (plain, mixed):
        Q = torch.linalg.qr(found.basis[0].double().mT).Q
        sine = float(torch.linalg.matrix_norm(Q - true @ (true.mT @ Q), 2))
        assert sine <= max(float(found.drift[0, -1]), 1e-6)
    # Where the plain iteration resolves the subspace, so does the mixed one, at the price of a filter at most.
    assert float(mixed.drift[0, -1]) <= max(1e-3, float(plain.drift[0, -1]))
    assert int(mixed.steps[0]) <= int(plain.steps[0]) + 16
    if name in ("power law 1/4", "spiked") and rank == 25:
        assert calls > 0


def test_reduced_precision_is_a_switch_that_is_put_back() -> None:
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    with reduced_precision(torch.device("cpu"), enabled=False):
        assert backend.fp32_precision == before
    with pytest.raises(KeyError), reduced_precision(torch.device("cpu"), enabled=True):
        assert backend.fp32_precision == "bf16"
        raise KeyError
    assert backend.fp32_precision == before


def test_leading_dimensions() -> None:
    W = gaussian(2, 3, 20, 30)
    found, measured = randomized_svd(W, 4, diagnostics=True)
    assert found.U.shape == (2, 3, 20, 4) and found.S.shape == (2, 3, 4) and found.Vh.shape == (2, 3, 4, 30)
    assert measured.subspace_error.shape == (2, 3) and measured.cut_errors.shape == (2, 3, 4)
    assert torch.equal(found.U[1, 2], randomized_svd(W[1, 2], 4).U)


def test_empty_batch() -> None:
    found, measured = randomized_svd(torch.zeros(0, 20, 30), 4, diagnostics=True)
    assert found.U.shape == (0, 20, 4) and found.S.shape == (0, 4) and found.Vh.shape == (0, 4, 30)
    assert measured.cut_errors.shape == (0, 4)


def test_signs_are_canonical() -> None:
    W = power_law(60, 80, 0.5).float()
    found, negative = randomized_svd(W, 6), randomized_svd(-W, 6)
    assert float((found.U - negative.U).abs().max()) < 1e-5
    assert float((found.Vh + negative.Vh).abs().max()) < 1e-5


def test_null_directions_are_completed_alike_everywhere() -> None:
    W = torch.zeros(30, 40)
    W[0, 0] = 3.0
    exact, shifted = randomized_svd(W, 4), randomized_svd(W * 4, 4, seed=3)
    assert torch.equal(exact.S, torch.tensor([3.0, 0, 0, 0]))
    assert float((exact.U - shifted.U).abs().max()) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_cut_inside_a_cluster_warns_with_numbers(method: str) -> None:
    with pytest.warns(RuntimeWarning, match=r"'W'.*error 1\.0e\+00.*relative gap.*cluster"):
        _, measured = randomized_svd(tied(), 25, method=method, diagnostics=True)
    assert float(measured.gap) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, measured = randomized_svd(tied(), 8, method=method, diagnostics=True)
    assert float(measured.gap) == pytest.approx(0.75, rel=1e-3)


def test_too_few_iterations_warn() -> None:
    with pytest.warns(RuntimeWarning, match="raise max_iter"):
        _, measured = randomized_svd(power_law(2100, 2048, 0.1).float(), 4, max_iter=4, diagnostics=True)
    assert int(measured.steps) == 4 and float(measured.subspace_error) > 1e-3


@pytest.mark.parametrize("interface", ["legacy", "by backend"])
def test_global_precision_switches_are_ignored_and_restored(interface: str) -> None:
    W = power_law(600, 640, 0.5).float()
    expected = randomized_svd(W, 8)
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    with restored_precision():
        if interface == "legacy":
            torch.set_float32_matmul_precision("medium")
        else:
            for backend, precision in zip(backends, ("bf16", "tf32"), strict=True):
                backend.fp32_precision = precision
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = randomized_svd(W.requires_grad_(), 8)
        assert [backend.fp32_precision for backend in backends] == ["bf16", "tf32"]
    assert torch.equal(found.U, expected.U) and torch.equal(found.S, expected.S)
    assert not found.U.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_is_refused(bad: float) -> None:
    W = gaussian(2, 64, 64)
    W[1, 1, 2] = bad
    with pytest.raises(ValueError, match=r"W\[1\].*contains " + ("NaN" if bad != bad else "Inf")):
        randomized_svd(W, 4)


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"min\(N, K\) = 40.*got {rank}"):
        randomized_svd(gaussian(60, 40), rank)


def test_full_rank_reconstructs() -> None:
    W = gaussian(40, 25).double()
    found, measured = randomized_svd(W, 25, diagnostics=True)
    assert float((found.U @ found.S.diag() @ found.Vh - W).abs().max()) < 1e-12
    assert float(measured.subspace_error) < 1e-12 and math.isinf(float(measured.gap))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="dequantise"):
        randomized_svd(torch.zeros(8, 8, dtype=dtype), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "power"}, "method must be"),
        ({"tol": 0.0}, "tol must lie"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"n_oversamples": 0}, "n_oversamples must be"),
        ({"vectors": "best"}, "vectors must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        randomized_svd(gaussian(8, 8), 2, **arguments)


def test_one_dimension_and_meta_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        randomized_svd(torch.zeros(8), 1)
    with pytest.raises(ValueError, match="meta device"):
        randomized_svd(torch.zeros(8, 8, device="meta"), 1)


def test_method_selection() -> None:
    recipe, large, small = Recipe(), torch.empty(1024, 4096, device="meta"), torch.empty(4096, 512, device="meta")
    # The meta device is an accelerator like any other.
    assert choose_method(large, 25, recipe, "auto") == "chebyshev"
    assert choose_method(large, 300, recipe, "auto") == "exact"
    assert choose_method(small, 4, recipe, "auto") == "chebyshev"
    on_cpu = torch.empty(1).expand(1024, 4096)
    assert choose_method(on_cpu, 25, recipe, "auto") == "block_lanczos"
    assert choose_method(on_cpu, 200, recipe, "auto") == "exact"
    assert choose_method(torch.empty(1).expand(4096, 512), 4, recipe, "auto") == "exact"
    assert choose_method(large, 25, Recipe(svd="exact"), "auto") == "exact"
    assert choose_method(large, 25, Recipe(vectors="middle"), "auto") == "exact"
