"""Is this the same basis? A sketch small enough to travel with every R."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .factors import Factors
from .probes import PROBE_STD, PROBE_U, PROBE_V, probes

_PROBES = 2


def sketch(factors: Factors, rank: int | None = None) -> Tensor:
    """What identifies each singular triplet: two projections of u_i, two of v_i on fixed vectors, and σ_i.

    Projections are those of unit vectors, whatever the placement of Σ, scaled to variance about 1. 20 bytes a vector.

    Args:
        factors: a basis of rank at least `rank`.
        rank: number of triplets; all of them if None.

    Returns:
        fp32 [5, rank] on the CPU: ⟨u_i, h_1⟩, ⟨u_i, h_2⟩, ⟨v_i, h_3⟩, ⟨v_i, h_4⟩, σ_i.

    Raises:
        ValueError: the basis has fewer than `rank` triplets.
    """
    rank = len(factors.s) if rank is None else rank
    if not 1 <= rank <= len(factors.s):
        raise ValueError(f"rank must be between 1 and the {len(factors.s)} of the basis, got {rank}")
    rows = [_projections(factors.bt[:rank], PROBE_U), _projections(factors.a[:rank], PROBE_V)]
    return torch.cat([*rows, factors.s[None, :rank].double().cpu()]).float()


def _projections(rows: Tensor, stream: int) -> Tensor:
    """[2, r] fp64 projections of the normalised rows [r, n]; 0 for rows of length 0."""
    rows = rows.double()
    length = torch.linalg.vector_norm(rows, dim=-1)
    length = torch.where(length > 0, length, 1.0)
    probe = probes(_PROBES, rows.shape[-1], stream, device=rows.device, dtype=torch.float64) / PROBE_STD
    return (probe @ (rows / length[:, None]).mT).cpu()


def compare_sketch(stored: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """How a stored basis relates to one at hand, triplet by triplet.

    Args:
        stored: [5, r], a `sketch` made earlier.
        factors: the basis to compare with, of rank at least r.

    Returns:
        signs, fp32 [r] of ±1: multiply u_i and v_i of `factors` by them to get the stored ones. error, fp32 [r]: the
        larger of the relative distances of the projections and of σ_i; about 1e-6 for the same weights, 1e-2 for the
        same model rounded to bf16, near 1 for another weight or another order.

    Raises:
        ValueError: `stored` is not a sketch, or has a larger rank than `factors`.
    """
    if stored.ndim != 2 or stored.shape[0] != 2 * _PROBES + 1:
        raise ValueError(f"stored must be a sketch of shape [5, r], got {tuple(stored.shape)}")
    return compare_sketches(stored, sketch(factors, stored.shape[1]))


def compare_sketches(stored: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """`compare_sketch` where of both bases only the sketches, [5, r], are at hand."""
    ours, theirs = other.detach().double().cpu(), stored.detach().double().cpu()
    signs = torch.where((ours[:-1] * theirs[:-1]).sum(0) < 0, -1.0, 1.0)
    apart = torch.linalg.vector_norm(theirs[:-1] - signs * ours[:-1], dim=0)
    size = torch.maximum(torch.linalg.vector_norm(theirs[:-1], dim=0), torch.linalg.vector_norm(ours[:-1], dim=0))
    # Nulls compare as equal to nulls: both sketches then hold the same fixed completion, or zeros. NaN equals nothing.
    turned = torch.where(size == 0, 0.0, apart / size)
    larger = torch.maximum(theirs[-1].abs(), ours[-1].abs())
    stretched = torch.where(larger == 0, 0.0, (theirs[-1] - ours[-1]).abs() / larger)
    return signs.float(), torch.maximum(turned, stretched).nan_to_num(nan=math.inf).float()
