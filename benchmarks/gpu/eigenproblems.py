"""The Jacobi kernel of loraxs::_eigh against torch.linalg.eigh, for the batches that Rayleigh–Ritz makes of a model."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import timed

Solver = Callable[[Tensor], tuple[Tensor, Tensor]]

SIZES = (64, 96, 128)
BATCHES = (64, 128)
TINY_SIZES, TINY_BATCHES = (5,), (2,)
ROUNDS = 5
# Of `_error`.
TOL = 1e-13


def measure(device: torch.device, *, dry: bool = False) -> list[dict[str, Any]]:
    """One row a spectrum, size and batch: seconds and errors of both solvers.

    Args:
        device: where to solve.
        dry: tiny shapes; the rows hold no times.
    """
    rows = []
    solvers, missing = _solvers(device)
    for size in TINY_SIZES if dry else SIZES:
        for batch in TINY_BATCHES if dry else BATCHES:
            for spectrum, A in _matrices(batch, size, device).items():
                row = {"kind": "eigh", "spectrum": spectrum, "batch": batch, "size": size}
                rows.append(row | _measure(A, solvers, dry) | {"not_available": missing})
    return rows


def _solvers(device: torch.device) -> tuple[dict[str, Solver], dict[str, str]]:
    """What can solve on this device, and why others cannot."""
    solvers: dict[str, Solver] = {"torch.linalg.eigh": torch.linalg.eigh}
    if find_spec("triton") is None:
        return solvers, {"Jacobi": "not available: Triton is not installed"}
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return solvers, {"Jacobi": "not available: Triton's kernels need a CUDA device"}
    from loraxs_ext.ops.triton.eigh import eigh

    return {"Jacobi": eigh} | solvers, {}


def _matrices(batch: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """Gram matrices of a first Rayleigh–Ritz step, and of one after a filter: nearly diagonal."""
    generator = torch.Generator(device).manual_seed(0)
    Y = torch.randn(batch, size, 4 * size, dtype=torch.float64, device=device, generator=generator)
    start = Y @ Y.mT / (4 * size)
    values = torch.linspace(3, 1, size, dtype=torch.float64, device=device)
    return {"start": start, "filtered": torch.diag_embed(values.expand(batch, size)) + 1e-3 * (start - start.mean())}


def _measure(A: Tensor, solvers: dict[str, Solver], dry: bool) -> dict[str, Any]:
    """Errors and seconds; a solver that is wrong has no figure."""
    errors = {name: _error(A, *solve(A)) for name, solve in solvers.items()}
    row: dict[str, Any] = {"worst_error": errors, "wrong": [name for name, error in errors.items() if not error < TOL]}
    if dry:
        return row
    row["seconds"] = {
        name: statistics.median(timed(lambda solve=solve: solve(A), A.device)[0] for _ in range(ROUNDS))
        for name, solve in solvers.items()
        if name not in row["wrong"]
    }
    return row


def _error(A: Tensor, values: Tensor, vectors: Tensor) -> float:
    """The larger of the residual ‖A v − λ v‖ / ‖A‖ and the loss of orthogonality."""
    missed = torch.linalg.vector_norm(A @ vectors - vectors * values[:, None], dim=-2)
    residual = (missed / values.abs().amax(-1, keepdim=True)).amax()
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return float(torch.maximum(residual, (vectors.mT @ vectors - eye).abs().amax()))
