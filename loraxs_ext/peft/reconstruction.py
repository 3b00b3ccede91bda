"""The reconstruction options of the reference code: its YAML file, and the JSON copy beside its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FLAGS = ("half_init_dec", "replacement_module_random_init", "r_squared")
_KEYS = {"reconstruction_type", "reconstr_mode", "svd", *_FLAGS}


@dataclass(frozen=True)
class Reconstruction:
    """How the reference makes A and B, and what it trains between them.

    Args:
        half_init_dec: draw the last ⌊r/2⌋ columns of B at random: U(−1/√N, 1/√N).
        replacement_module_random_init: draw all of A and B at random: U(−1/√r, 1/√r) and U(−1/√N, 1/√N).
        r_squared: train R between frozen A and B (LoRA-XS); False: B = U and A ~ N(0, σ²), both trained (LoRA).
        n_iter, random_state: of scikit-learn's TruncatedSVD; see `Recipe.sklearn_n_iter`.
        rank: the rank of the SVD; None where it is not said.
    """

    half_init_dec: bool = False
    replacement_module_random_init: bool = False
    r_squared: bool = True
    n_iter: int = 10
    random_state: int = 42
    rank: int | None = None

    @property
    def draws_basis(self) -> bool:
        """Whether A or B are random, so that nobody can compute them again."""
        return self.half_init_dec or self.replacement_module_random_init

    @property
    def recipe_fields(self) -> dict[str, Any]:
        """The fields of `LoraXSConfig` that make the same basis."""
        return {"svd": "reference", "sklearn_n_iter": self.n_iter, "sklearn_random_state": self.random_state}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], source: str = "reconstruct_config") -> Reconstruction:
        """Read the keys of the reference; absent ones are its defaults.

        Args:
            options: what its YAML file parses to.
            source: name of the argument or file, for messages.

        Raises:
            ValueError or TypeError: a key is unknown or out of range; it is named.
        """
        if not isinstance(options, Mapping):
            raise TypeError(f"{source}: expected a dictionary of options, got {type(options).__name__}")
        _expect_known(set(options), _KEYS, source)
        for key, expected in (("reconstruction_type", "svd"), ("reconstr_mode", "separated")):
            if options.get(key, expected) != expected:
                raise ValueError(f"{source}[{key!r}]: expected {expected!r}, got {options[key]!r}")
        flags = {key: options[key] for key in _FLAGS if key in options}
        for key, value in flags.items():
            if not isinstance(value, bool):
                raise TypeError(f"{source}[{key!r}]: expected True or False, got {value!r}")
        svd = options.get("svd", {})
        if not isinstance(svd, Mapping):
            raise TypeError(f"{source}['svd']: expected a dictionary of options, got {type(svd).__name__}")
        _expect_known(set(svd), {"n_iter", "random_state", "rank"}, f"{source}['svd']")
        for key, least in (("n_iter", 0), ("random_state", 0), ("rank", 1)):
            if key in svd and (type(svd[key]) is not int or not least <= svd[key] < 2**32):
                raise ValueError(
                    f"{source}['svd'][{key!r}]: expected a whole number in [{least}, 2^32), got {svd[key]!r}"
                )
        return cls(**flags, **svd)


def _expect_known(keys: set[Any], known: set[str], source: str) -> None:
    if keys - known:
        raise ValueError(f"{source}: expected keys among {sorted(known)}, got {sorted(map(str, keys - known))} too")
