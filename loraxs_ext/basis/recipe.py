"""How a basis is computed, as plain data: the part of an adapter file that makes its R meaningful again elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

SigmaPlacement = Literal["A", "sqrt", "B"]
Vectors = Literal["top", "middle", "bottom", "random"]
Decomposition = Literal["converged", "exact", "reference"]
SklearnSigns = Literal["rows of A", "columns of B"]

# Version of the random numbers, sign rule and completion: a change of any of them changes computed bases.
SKETCH_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Everything but the weight and the rank that determines A and B.

    The rank is left out on purpose: singular vectors are ordered, so the factors of a smaller rank are the first rows
    of those of a larger one (up to `tol`).

    Args:
        sigma: where the singular values sit. "A": a = ΣVᵀ, b = U (LoRA-XS). "sqrt": a = √ΣVᵀ, b = U√Σ (TinyLoRA).
            "B": a = Vᵀ, b = UΣ (PSOFT).
        vectors: which singular vectors. "top": from the largest down; "bottom": from the smallest up; "middle":
            outward from the centre of the spectrum; "random": a permutation fixed by `seed`.
        svd: "converged" iterates to `tol` and takes the exact path where that is cheaper; "exact" always decomposes
            completely; choices of vectors other than "top" are always exact. "reference" repeats the power iterations
            of the LoRA-XS code, from the same start (scikit-learn's TruncatedSVD(r, n_iter=10, random_state=42)): not
            converged, but an R that was trained on such a basis means the same on this one. It uses no other fields
            but `sigma` and the three of scikit-learn, and its ranks are not nested.
        sklearn_signs: for svd="reference", whose largest entries are positive: "rows of A" in scikit-learn ≤ 1.4,
            which the LoRA-XS code pins, "columns of B" in ≥ 1.5.
        sklearn_n_iter: for svd="reference", the number of power iterations, at least 0.
        sklearn_random_state: for svd="reference", the seed of the start, in [0, 2^32).
        n_oversamples: Ritz vectors beyond the rank that survive a restart of the iteration, at least 1.
        tol: bound on the sine of the largest angle between the computed and the true singular subspace.
        max_iter: bound on the number of Lanczos steps (two products with the weight each).
        seed: 64-bit seed of the starting block and of "random".
        sketch_version: version of random numbers, signs and completion; only the current one can be computed.

    Raises:
        ValueError: a field is outside its choices or range.
        TypeError: a field that is a number is none, or no whole one.
    """

    sigma: SigmaPlacement = "A"
    vectors: Vectors = "top"
    svd: Decomposition = "converged"
    sklearn_signs: SklearnSigns = "rows of A"
    sklearn_n_iter: int = 10
    sklearn_random_state: int = 42
    n_oversamples: int = 32
    tol: float = 1e-3
    max_iter: int = 100
    seed: int = 0
    sketch_version: int = SKETCH_VERSION

    def __post_init__(self) -> None:
        for name, choices in (
            ("sigma", get_args(SigmaPlacement)),
            ("vectors", get_args(Vectors)),
            ("svd", get_args(Decomposition)),
            ("sklearn_signs", get_args(SklearnSigns)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.svd == "reference" and self.vectors != "top":
            raise ValueError(f"svd='reference' has the top vectors only, got vectors={self.vectors!r}")
        for name in ("n_oversamples", "max_iter", "seed", "sklearn_n_iter", "sklearn_random_state", "sketch_version"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} must be an int, got {value!r}")
        if isinstance(self.tol, bool) or not isinstance(self.tol, Real):
            raise TypeError(f"tol must be a number, got {self.tol!r}")
        for name in ("n_oversamples", "max_iter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sklearn_n_iter < 0:
            raise ValueError(f"sklearn_n_iter must be at least 0, got {self.sklearn_n_iter}")
        if not 0 <= self.sklearn_random_state < 2**32:
            raise ValueError(f"sklearn_random_state must be in [0, 2^32), got {self.sklearn_random_state}")
        if not 0.0 < self.tol < 1.0:
            raise ValueError(f"tol must lie between 0 and 1, got {self.tol}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.sketch_version != SKETCH_VERSION:
            raise ValueError(
                f"sketch_version {self.sketch_version} cannot be computed by this release, which knows {SKETCH_VERSION}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of `to_dict`; a field that is absent keeps its default.

        Raises:
            ValueError: an unknown field, or a value that is out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"recipe has unknown fields {unknown}; known are {known}")
        return cls(**values)
