"""The decomposition of the encoder's weights: how long it takes, how exact it is, and what the spectra look like."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from peft import PeftConfig
from torch import Tensor

from loraxs_ext.basis import decompose


@dataclass(frozen=True)
class Decomposition:
    """Measurements of one decomposition.

    matrices, rank: how many weights were decomposed, and to which rank.
    seconds, exact_seconds: wall-clock of the batched decomposition, and of a complete SVD of every weight.
    error: largest sine of the angle between a computed and the true singular subspace, as measured by the method.
    value_error: largest relative error of a singular value against the complete SVD.
    spectra: module name -> all singular values, from the complete SVD.
    """

    matrices: int
    rank: int
    seconds: float
    exact_seconds: float
    error: float
    value_error: float
    spectra: dict[str, list[float]]


def measure(weights: dict[str, Tensor], config: PeftConfig) -> Decomposition:
    """Decompose ``weights`` (name -> [d_out, d_in]) by the config's rank and recipe, and compare with complete SVDs."""
    start = time.perf_counter()
    factors = decompose(weights, config.r, config.recipe(), cache_dir=None, progress=False)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    exact = {name: torch.linalg.svd(weight, full_matrices=False)[1] for name, weight in weights.items()}
    exact_seconds = time.perf_counter() - start
    value_error = max(
        ((f.s.double() / exact[n][: config.r].double()) - 1).abs().max().item() for n, f in factors.items()
    )
    return Decomposition(
        matrices=len(weights),
        rank=config.r,
        seconds=seconds,
        exact_seconds=exact_seconds,
        error=max(float(f.subspace_error) for f in factors.values()),
        value_error=value_error,
        spectra={name: values.tolist() for name, values in exact.items()},
    )
