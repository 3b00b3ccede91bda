"""From a stack of equal shapes to orthonormal left vectors, the product UᵀW and an error for every cut."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .angles import ZERO_LEVEL, cut_bounds
from .chebyshev import chebyshev_subspace
from .exact import Subspace, full_svd, gram_subspace
from .lanczos import block_size, lanczos_subspace
from .orthonormal import orthonormalize_rows
from .precision import multiply_rows, reads_once
from .probes import COMPLETION, SIGN, probes
from .recipe import Recipe
from .sklearn_svd import sklearn_left_vectors, sklearn_signs
from .streaming import chunk_bytes

_eigh = torch.ops.loraxs._eigh.default

Method = Literal["auto", "block_lanczos", "chebyshev", "exact"]

# On a CPU a complete fp64 eigendecomposition costs less than iterating below this side, or for large rank fractions
# (measured). On an accelerator eigenproblems are slow for their size, products are not (a model, not measured).
_EXACT_SIDE = {"cpu": 512}
_EXACT_FRACTION = {"cpu": 8}
_EXACT_SIDE_DEVICE, _EXACT_FRACTION_DEVICE = 256, 4
# Below this σ_i/σ_1 the fp64 Gram matrix has lost σ_i², and only a full SVD finds the vector.
_GRAM_RESOLVES = 1e-6
# Reading a matrix once a step instead of twice is worth vectors of the longer side up to this ratio of the two.
_LONGER_SIDE = 4
# Early filters in TF32 on an accelerator: a model says a third of the time, tests in bf16 say the same accuracy.
_REDUCED_START = True
# Orthonormalising and rounding the vectors to the dtype turns them by this many eps.
_ROUNDED = 8.0


class Convergence(NamedTuple):
    """What was measured about one weight: subspace error, relative gap of σ² at the cut, Lanczos steps."""

    error: float
    gap: float
    steps: int


class Triplets(NamedTuple):
    """Singular triplets of a stack of matrices, in the order of the recipe's choice of vectors.

    Attributes:
        left: [b, r, N] orthonormal rows Uᵀ, signs canonical.
        projected: [b, r, K], the product UᵀW = ΣVᵀ.
        right: [b, r, K] orthonormal rows Vᵀ.
        s: [b, r] singular values, the lengths of the rows of `projected`.
        errors: [b, r] fp64, estimated sine of the largest angle to the true subspace when the rank were 1…r.
        gaps: [b, r] fp64, distance of the r chosen σ² to those outside, per rank, relative to the closest chosen one.
        steps: [b] int64, Lanczos steps; 0 where the decomposition was complete.
    """

    left: Tensor
    projected: Tensor
    right: Tensor
    s: Tensor
    errors: Tensor
    gaps: Tensor
    steps: Tensor

    def convergence(self) -> list[Convergence]:
        """What was measured at the full rank, for each matrix."""
        columns = (self.errors[:, -1].tolist(), self.gaps[:, -1].tolist(), self.steps.tolist())
        return [Convergence(*row) for row in zip(*columns, strict=True)]


def choose_method(W: Tensor, rank: int, recipe: Recipe, method: Method) -> Method:
    """The method that `auto` stands for: complete where that is cheap or needed, an iteration elsewhere.

    Block Lanczos needs the fewest operations, which counts on a CPU. Chebyshev-filtered subspace iteration consists of
    large products and small eigenproblems of one size, which suits an accelerator (a model, not measured).
    """
    side, device = min(W.shape[-2:]), W.device.type
    if recipe.svd == "exact" or recipe.vectors != "top":
        return "exact"
    if method != "auto":
        return method
    if side <= _EXACT_SIDE.get(device, _EXACT_SIDE_DEVICE):
        return "exact"
    if rank * _EXACT_FRACTION.get(device, _EXACT_FRACTION_DEVICE) > side:
        return "exact"
    return "block_lanczos" if device == "cpu" else "chebyshev"


def check_rank(rank: int, shape: Sequence[int], name: str) -> None:
    """Refuse ranks that the matrix does not have.

    Raises:
        ValueError: rank < 1 or rank > min(N, K).
    """
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(
            f"rank of weight {name!r} must be between 1 and min(N, K) = {min(shape[-2:])} for shape {tuple(shape)}, "
            f"got {rank}"
        )


def solve(W: Tensor, rank: int, recipe: Recipe, method: Method = "auto") -> Triplets:
    """Singular triplets of a stack of matrices.

    Args:
        W: [b, N, K], fp32 or fp64, finite, entries of moderate size (`precision.scale_exponents`).
        rank: between 1 and min(N, K).
        recipe: vectors, svd, n_oversamples, tol, max_iter and seed are used.
        method: "auto", or one of the others to force it.
    """
    if recipe.svd == "reference":
        return _solve_as_sklearn(W, rank, recipe)
    chosen = choose_method(W, rank, recipe, method)
    if chosen == "exact":
        return _solve_exact(W, rank, recipe)
    pieces = W.split(_together(W)) if W.device.type == "cpu" else (W,)
    done = [_solve_iteratively(piece, rank, recipe, chosen) for piece in pieces]
    return done[0] if len(done) == 1 else Triplets(*(torch.cat(parts) for parts in zip(*done, strict=True)))


def _together(W: Tensor) -> int:
    """Matrices of a stack that a CPU iterates on in step, which saves calls; no result depends on the others.

    One thread adds up a batch in the order of a single matrix, several do not (MKL).
    """
    if torch.get_num_threads() > 1:
        return 1
    return max(1, chunk_bytes(W.device) // max(1, W.shape[-2] * W.shape[-1] * W.element_size()))


def _solve_exact(W: Tensor, rank: int, recipe: Recipe) -> Triplets:
    if recipe.vectors == "top" and W.dtype != torch.float64:
        left = W.shape[-2] <= W.shape[-1]
        return _finish(W, gram_subspace(W if left else W.mT, rank), left)
    return _solve_fully(W, rank, recipe)


def _solve_fully(W: Tensor, rank: int, recipe: Recipe) -> Triplets:
    left, right, rest = full_svd(W, rank, recipe.vectors, recipe.seed)
    unknown = torch.full_like(left[..., 0], torch.inf)
    steps = torch.zeros(len(W), dtype=torch.int64, device=W.device)
    return _measure(W, left.to(W.dtype), right.to(W.dtype), rest, unknown, steps)


def _solve_as_sklearn(W: Tensor, rank: int, recipe: Recipe) -> Triplets:
    """The unconverged basis of the LoRA-XS code; its error is reported, not improved."""
    left, rest = sklearn_left_vectors(W, rank, recipe.sklearn_n_iter, recipe.sklearn_random_state)
    projected = multiply_rows(left, W)
    sign = sklearn_signs(left, projected, recipe.sklearn_signs)
    back = multiply_rows(projected, W.mT)
    outside = (back - (back @ left.mT) @ left).double().square().sum(-1)
    gram = (projected @ projected.mT).double()
    zero = _zero_level(rest.new_zeros(len(W), 1), W.dtype)
    bounds, _ = cut_bounds(gram.diagonal(dim1=-2, dim2=-1), rest.square(), zero, outside, gram.square())
    # Only at its own rank is this the reference's basis: that of a smaller rank starts from fewer vectors.
    bounds[:, :-1] = 1.0
    steps = torch.full((len(W),), recipe.sklearn_n_iter, device=W.device)
    return _measure(W, left * sign, None, rest, bounds.clamp_max(1.0), steps, signed=True)


def _solve_iteratively(W: Tensor, rank: int, recipe: Recipe, method: Method) -> Triplets:
    """An iteration, with what rounding leaves unresolved (a large σ_1 above a small gap) repeated more exactly."""
    found = _finish(W, *_iterate(W, rank, recipe, method))
    again = (found.errors[:, -1] > recipe.tol) & (found.steps < recipe.max_iter)
    if W.dtype == torch.float64:
        again &= found.s[:, -1] < _GRAM_RESOLVES * found.s[:, 0]
    else:
        again &= found.steps > 0
    if bool(again.any()):
        where = again.nonzero()[:, 0]
        if W.dtype == torch.float64:
            finer = _solve_fully(W[where], rank, recipe)
        else:
            finer = _finish(W[where], *_iterate(W[where].double(), rank, recipe, method))
        for kept, new in zip(found, finer, strict=True):
            kept[where] = new
    return found


def _iterate(W: Tensor, rank: int, recipe: Recipe, method: Method) -> tuple[Subspace, bool]:
    """An approximate subspace, and whether it is of the left singular vectors."""
    options = (rank, recipe.n_oversamples, recipe.tol, recipe.max_iter, recipe.seed)
    left = W.shape[-2] <= W.shape[-1]
    if method == "chebyshev":
        reduced = _REDUCED_START and W.device.type != "cpu" and W.dtype == torch.float32
        return chebyshev_subspace(W if left else W.mT, *options, reduced=reduced), left
    block = block_size(W.device, rank)
    if max(W.shape[-2:]) <= _LONGER_SIDE * min(W.shape[-2:]) and (reads_once(W, block) or reads_once(W.mT, block)):
        left = reads_once(W, block)
    return lanczos_subspace(W if left else W.mT, *options, block), left


def _finish(W: Tensor, subspace: Subspace, from_left: bool) -> Triplets:
    """Rayleigh–Ritz on the candidate subspace of one side, then the orthonormal left vectors."""
    image = multiply_rows(subspace.basis.to(W.dtype), W if from_left else W.mT).double()
    values, rotation = _eigh(image @ image.mT)
    values, rotation = values.flip(-1).clamp_min(0.0), rotation.flip(-1).mT
    candidate = rotation @ (subspace.basis.double() if from_left else image)
    # Directions of singular values that are zero are arbitrary; fixed ones make them the same everywhere.
    stand_in = _completion(candidate)
    zero = values.sqrt() <= _zero_level(values[:, :1].sqrt(), W.dtype)
    left = orthonormalize_rows(torch.where(zero[..., None], stand_in, candidate)).to(W.dtype)
    return _measure(W, left, None, subspace.rest, subspace.drift, subspace.steps)


def _measure(
    W: Tensor,
    left: Tensor,
    right: Tensor | None,
    rest: Tensor,
    drift: Tensor,
    steps: Tensor,
    *,
    signed: bool = False,
) -> Triplets:
    """Fix the signs unless they are `signed` already, form UᵀW, and collect the subspace error of every cut.

    An iteration brings its own estimate, `drift`; its residuals could not tell that it missed a direction. A complete
    decomposition (+inf) knows all singular values, so there the bound by residuals and gaps holds.
    """
    sign = torch.ones_like(left[..., :1]) if signed else canonical_signs(left)
    left = left * sign
    projected = multiply_rows(left, W)
    lengths = torch.linalg.vector_norm(projected.double(), dim=-1)
    level = _zero_level(torch.cat([lengths, rest], -1).amax(-1, keepdim=True), W.dtype)
    if right is None:
        unit = projected.double() / lengths[..., None].clamp_min(1e-300)
        unit = torch.where((lengths > level)[..., None], unit, _completion(projected))
        right = orthonormalize_rows(unit).to(W.dtype)
    else:
        right = right * sign
    complete = ~drift[:, -1].isfinite()
    outside, among = torch.zeros_like(lengths), None
    if bool(complete.any()):
        # In fp64: a large σ_1 would drown the residuals of the others in the rounding of fp32 products.
        basis, wide = left.double(), W.double()
        image = basis @ wide
        back = image @ wide.mT
        outside = (back - (back @ basis.mT) @ basis).square().sum(-1)
        among = (image @ image.mT).square()
    bounds, gaps = cut_bounds(lengths.square(), rest.square(), level.square(), outside, among)
    # The vectors are rounded to W's dtype, whatever they were computed in.
    rounding = _ROUNDED * torch.finfo(W.dtype).eps
    errors = (torch.where(complete[:, None], bounds, drift) + rounding).clamp_max(1.0)
    smallest = lengths.square().cummin(-1).values.clamp_min(1e-300)
    return Triplets(left, projected, right, lengths.to(W.dtype), errors, gaps / smallest, steps)


def _completion(rows: Tensor) -> Tensor:
    """Fixed pseudo-random rows [r, n] to stand in for directions that the matrix does not determine."""
    rank, length = rows.shape[-2:]
    return probes(rank, length, COMPLETION, device=rows.device, dtype=torch.float64)


def _zero_level(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return ZERO_LEVEL * torch.finfo(dtype).eps * largest


def canonical_signs(left: Tensor) -> Tensor:
    """±1 that make ⟨u_i, h⟩ ≥ 0 for one fixed pseudo-random h, stable under rounding of the weight.

    The largest entry of a vector, the usual anchor of its sign, is often matched by another one of opposite sign.

    Args:
        left: [..., r, N], rows along the left singular vectors, any length.

    Returns:
        [..., r, 1] in left's dtype.
    """
    probe = probes(1, left.shape[-1], SIGN, device=left.device, dtype=torch.float64)[0]
    return torch.where(left.double() @ probe < 0, -1.0, 1.0).to(left.dtype)[..., None]


def warn_unconverged(measured: Mapping[str, Convergence], tol: float, stacklevel: int = 3) -> None:
    """One warning for all weights whose subspace error misses the tolerance, with the numbers of the worst."""
    missed = {name: seen for name, seen in measured.items() if seen.error > tol}
    if missed:
        worst = max(missed, key=lambda name: missed[name].error)
        error, gap, steps = missed[worst]
        warnings.warn(
            f"{len(missed)} of {len(measured)} weights miss the subspace tolerance {tol:.1e}, {worst!r} most: error "
            f"{error:.1e} after {steps} steps, relative gap of squared singular values at the cut {gap:.1e}. A tiny "
            "gap means that the cut falls inside a cluster: choose another rank; otherwise raise max_iter",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
