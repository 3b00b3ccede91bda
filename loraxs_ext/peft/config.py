"""LoraXSConfig: what a user chooses, and what a file needs so that its R means the same elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig

from loraxs_ext.basis import Recipe

from .patterns import check_patterns
from .register import PEFT_TYPE

BasisCheck = Literal["error", "warn", "ignore"]

# Fields of this class that are fields of the recipe under another name.
_RECIPE_NAMES = {"svd_tol": "tol", "svd_max_iter": "max_iter", "svd_seed": "seed"}
_SKLEARN_FIELDS = ("sklearn_signs", "sklearn_n_iter", "sklearn_random_state")
# Fields of this class that all adapters of a model must agree in.
RECIPE_FIELDS = ("sigma", "vectors", "svd", *_SKLEARN_FIELDS, "n_oversamples", "sketch_version", *_RECIPE_NAMES)


@dataclass
class LoraXSConfig(PeftConfig):
    """Configuration of a LoRA-XS adapter: ΔW = s·B R A with frozen A, B from the SVD of W, and a trainable R [r, r].

    The first group has the names and meanings of `LoraConfig`.

    Args:
        r: rank; clamped to min(N, K) in small layers.
        lora_alpha: alpha; s = alpha / r.
        use_rslora: s = alpha / √r.
        loraxs_dropout: probability in [0, 1) of dropping entries of the input of the low-rank path.
        target_modules: names, a regular expression, or "all-linear"; None for the model's default.
        exclude_modules: names or a regular expression.
        target_parameters: names, or ends of names, of parameters [N, K] or [E, N, K] that no layer of their own holds,
            such as "experts.gate_up_proj"; [E, K, N] where the module says `is_transposed`.
        ensure_weight_tying: adapt the input embedding and the layers that share its weight with one R, wherever one of
            them is a target.
        rank_pattern, alpha_pattern: r and alpha by module name or regular expression.
        bias: "none", "all" or "loraxs_only".
        modules_to_save: other modules to train and save completely.
        trainable_token_indices: rows of the input embedding to train.
        layers_to_transform, layers_pattern: restrict `target_modules` to layers by index.
        fan_in_fan_out: accepted for compatibility; the layout follows from the type of the layer, and a warning says
            so where the two disagree.

        init_weights: True for R ~ N(0, init_std²) (the reference), "zeros" for an exact no-op, False for a random
            adapter that clearly changes the model, for tests.
        init_std: standard deviation of R at the start.
        init_seed: seed of R; each module draws its own numbers from it and from its name.

        use_tinylora: train v instead of R = Σ_k v_k P_k with fixed random P_k (TinyLoRA). `init_weights` then speaks of
            v: True or "zeros" for 0, an exact no-op; "uniform"; False for a random adapter, for tests. The adapter is
            that of PEFT's TinyLoRA for `sigma="sqrt"` and `lora_alpha=r`.
        u: length of v.
        weight_tying: 0 for a v per module, 1 for one v in all of them, values in between for groups of neighbours.
        projection_seed: seed of P; the module `i` draws from `projection_seed + i`.
        save_projection: store P with v: u·r² numbers a module, against a generator that rounds differently elsewhere.
        init_v_bound: v ~ U(−init_v_bound, init_v_bound) for `init_weights="uniform"`.

        sigma: where the singular values sit: "A" (the reference), "sqrt" or "B".
        vectors: which singular vectors: "top", "middle", "bottom" or "random".
        svd: "converged", "exact" or "reference".
        sklearn_signs, sklearn_n_iter, sklearn_random_state, n_oversamples, svd_tol, svd_max_iter, svd_seed,
            sketch_version: see `loraxs_ext.basis.Recipe`.

        save_basis: store A and B with R: a file of LoRA's size that needs no SVD and fits any copy of the base model.
        basis_file: path of a file made by `loraxs init --output` for this base model: its bases are used instead of
            computed ones, or its anchors to find the same bases again in rounded weights. A missing file is warned of.
        basis_check: what to do when a loaded R meets another basis: "error", "warn" or "ignore".
        basis_tol: largest accepted difference of the bases, measured as in `loraxs_ext.peft.verify`; the bound on the
            residual of an anchor (0.01) moves in proportion.
        base_fingerprint: 64 bits of the base weights, in hex; written when the adapter is saved.

        use_edora: train the lengths m of the rows of the adapted weight beside R: N numbers more in each module.
        edora_norm: "detached" takes their norm for a constant in the gradient of R, as DoRA and the reference do;
            "differentiated" does not.

    Raises:
        ValueError or TypeError: a field is out of range, or has a pattern that could take for ever to match; the
            message names it, what was expected and what came.

    Source: Bałazy, Banaei, Aberer, Tabor: "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters";
    TinyLoRA: "Learning to Reason in 13 Parameters" (arXiv:2602.04118), in the conventions of PEFT.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    loraxs_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all", "loraxs_only"] = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False

    init_weights: bool | Literal["zeros", "uniform"] = True
    init_std: float = 1e-5
    init_seed: int = 0

    use_tinylora: bool = False
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = False
    init_v_bound: float = 0.02

    sigma: Literal["A", "sqrt", "B"] = "A"
    vectors: Literal["top", "middle", "bottom", "random"] = "top"
    svd: Literal["converged", "exact", "reference"] = "converged"
    sklearn_signs: Literal["rows of A", "columns of B"] = "rows of A"
    sklearn_n_iter: int = Recipe.sklearn_n_iter
    sklearn_random_state: int = Recipe.sklearn_random_state
    n_oversamples: int = Recipe.n_oversamples
    svd_tol: float = Recipe.tol
    svd_max_iter: int = Recipe.max_iter
    svd_seed: int = Recipe.seed
    sketch_version: int = Recipe.sketch_version

    save_basis: bool = False
    basis_file: str | None = None
    basis_check: BasisCheck = "error"
    basis_tol: float = 0.1
    base_fingerprint: str | None = None

    use_edora: bool = False
    edora_norm: Literal["detached", "differentiated"] = "detached"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        # Found in the model when an adapter is added to it; of the instance, not of the file.
        self.target_modules_to_tie: list[str] = []
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check()
        self.recipe()

    def recipe(self) -> Recipe:
        """How the basis is computed."""
        return Recipe(**{_RECIPE_NAMES.get(name, name): getattr(self, name) for name in RECIPE_FIELDS})

    def _check(self) -> None:
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"{name}: expected an int, got {rank!r}")
            _expect(rank >= 1, name, "a positive integer", rank)
        alphas = {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        numbers = {name: getattr(self, name) for name in ("loraxs_dropout", "init_std", "basis_tol", "svd_tol")}
        for name, number in {"lora_alpha": self.lora_alpha, **alphas, **numbers}.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name}: expected a number, got {number!r}")
            _expect(math.isfinite(number), name, "a finite number", number)
        # Whoever loads a file of others, it ends up here.
        check_patterns(vars(self))
        _expect(0.0 <= self.loraxs_dropout < 1.0, "loraxs_dropout", "a probability in [0, 1)", self.loraxs_dropout)
        _expect(self.bias in ("none", "all", "loraxs_only"), "bias", "'none', 'all' or 'loraxs_only'", self.bias)
        if self.use_tinylora:
            self._check_tinylora()
        else:
            plain = self.init_weights in (True, False, "zeros")
            _expect(plain, "init_weights", "True, False or 'zeros'", self.init_weights)
        _expect(self.init_std >= 0.0, "init_std", "a standard deviation of at least 0", self.init_std)
        _expect(
            self.basis_check in ("error", "warn", "ignore"),
            "basis_check",
            "'error', 'warn' or 'ignore'",
            self.basis_check,
        )
        _expect(self.basis_tol > 0.0, "basis_tol", "a positive number", self.basis_tol)
        if not isinstance(self.use_edora, bool):
            raise TypeError(f"use_edora: expected True or False, got {self.use_edora!r}")
        _expect(
            self.edora_norm in ("detached", "differentiated"),
            "edora_norm",
            "'detached' or 'differentiated'",
            self.edora_norm,
        )
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters: expected a list of names, got {self.target_parameters!r}")
        if self.target_parameters and self.loraxs_dropout > 0:
            raise ValueError(
                "loraxs_dropout: expected 0 with target_parameters, whose input is not seen, got "
                f"{self.loraxs_dropout!r}"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: expected layers_to_transform beside it, got None")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform: expected target_modules as a list of names, got a string")

    def _check_tinylora(self) -> None:
        for name, value in {"u": self.u, "projection_seed": self.projection_seed}.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {value!r}")
        _expect(self.u >= 1, "u", "a positive integer", self.u)
        _expect(0.0 <= self.weight_tying <= 1.0, "weight_tying", "a ratio in [0, 1]", self.weight_tying)
        _expect(0 <= self.projection_seed < 2**62, "projection_seed", "a seed in [0, 2^62)", self.projection_seed)
        _expect(0.0 <= self.init_v_bound < float("inf"), "init_v_bound", "a bound of at least 0", self.init_v_bound)
        known = self.init_weights in (True, False, "zeros", "uniform")
        _expect(known, "init_weights", "True, False, 'zeros' or 'uniform'", self.init_weights)


def _expect(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
