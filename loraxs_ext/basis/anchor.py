"""A basis found again: what must be kept of it so that a recomputed one can be turned onto it, and how well that went.

Near-degenerate singular values leave the vectors of a basis to the algorithm, the device and the last bit of the
weights, but hardly the space of somewhat more of them. So a few fixed projections of the old vectors, its anchor, are
kept; they locate every old vector within a larger basis of the weights at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .factors import Factors
from .precision import full_precision
from .probes import ANCHOR, PROBE_STD, probes
from .recipe import SigmaPlacement

# A basis of rank r is looked for among r + 16 vectors, by r + 24 projections: with no more projections than vectors
# nothing would be left over to tell a wrong base, and rounding would be amplified up to 7,000 times.
SEARCHED = 16
PROJECTED = SEARCHED + 8

# Bounds on the residual of a rotation, measured on the weights of MiniLM-L6 (`describe_residual` names what they
# separate): the same weights 1e-7…2e-6; bf16 3e-4…1e-3; nf4 1.4e-2…6e-2; another layer or base at least 0.21.
SAME_WEIGHTS = 1e-5
SAME_MODEL = 1e-2
SAME_ORIGIN = 0.1


class Anchor(NamedTuple):
    """What is kept of a basis.

    Attributes:
        projections: fp32 [r, r + 24], the orthonormal side (U, but V where Σ is with B) on fixed pseudo-random vectors.
        s: fp32 or fp64 [r], singular values.
    """

    projections: Tensor
    s: Tensor

    def cut(self, rank: int) -> Anchor:
        """The anchor of the first `rank` triplets."""
        return Anchor(self.projections[:rank], self.s[:rank])


def make_anchor(factors: Factors, sigma: SigmaPlacement) -> Anchor:
    """The anchor of a basis, on the CPU.

    Args:
        factors: the basis, before any rounding to half types.
        sigma: where its singular values sit.
    """
    lead, _ = _leading_side(factors, sigma)
    return Anchor(_project(lead, len(lead) + PROJECTED).float(), factors.s.detach().cpu())


def rotate_onto(anchor: Anchor, fresh: Factors, sigma: SigmaPlacement) -> tuple[Factors, float]:
    """Turn a larger basis of the weights at hand onto the one that an anchor was made of.

    P = argmin ‖anchor − P·lead·Ω‖, then lead' = polar(P)·lead and, by the same rotation, the product of the weights
    with it: B = U, A = BᵀW; or A = Vᵀ, B = WAᵀ where Σ is with B.

    Args:
        anchor: of r triplets.
        fresh: of r + SEARCHED triplets, or as many as the weight has.
        sigma: where the singular values sit, in both.

    Returns:
        Factors of rank r in the dtype and on the device of `fresh`, and the residual ‖anchor − P·lead·Ω‖/‖anchor‖.
        Where `fresh` is complete (square matrices of small side) the residual is 0 whatever the weights are.

    Raises:
        ValueError: the anchor leaves no projections over, or has more triplets than `fresh`.
    """
    rank, k = anchor.projections.shape
    if not rank <= len(fresh.s) < k:
        raise ValueError(f"fresh must have at least {rank} and fewer than {k} triplets, got {len(fresh.s)}")
    lead, image = _leading_side(fresh, sigma)
    target = anchor.projections.double()
    found = _project(lead, k)
    p = torch.linalg.lstsq(found.mT, target.mT, driver="gelsd").solution.mT
    residual = torch.linalg.matrix_norm(target - p @ found) / torch.linalg.matrix_norm(target).clamp_min(1e-300)
    u, _, vh = torch.linalg.svd(p, full_matrices=False)
    rotation = (u @ vh).to(lead.device)
    lead, image = rotation @ lead, rotation @ image
    if sigma == "sqrt":
        root = anchor.s.double().sqrt().to(lead.device)[:, None]
        lead, image = lead * root, torch.where(root > 0, image / root, 0.0)
    a, bt = (lead, image) if sigma == "B" else (image, lead)
    s = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(bt, dim=1)
    return Factors(a.to(fresh.a), bt.to(fresh.bt), s.to(fresh.s), fresh.subspace_error), float(residual)


def fit_error(factors: Factors, weight: Tensor, sigma: SigmaPlacement) -> float:
    """How well a basis made elsewhere fits these weights: ‖A − BᵀW‖/‖A‖, or ‖B − WAᵀ‖/‖B‖ where Σ is with B.

    0 up to rounding for the weights that the basis was made of, whatever made it; comparable to the residual of
    `rotate_onto`, but found without a decomposition.

    Args:
        factors: the basis.
        weight: [N, K].
        sigma: where the singular values sit.
    """
    lead, image = _leading_side(factors, sigma)
    with full_precision(lead.device):
        weight = weight.detach().to(lead.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)
        product = lead.to(weight) @ (weight.mT if sigma == "B" else weight)
    size = torch.linalg.matrix_norm(image).clamp_min(1e-300)
    return float(torch.linalg.matrix_norm(product.double() - image) / size)


def describe_residual(residual: float) -> str:
    """What a residual says about the weights, in words."""
    if residual <= SAME_WEIGHTS:
        return "the same weights"
    if residual <= SAME_MODEL:
        return "the same model in another precision"
    if residual <= SAME_ORIGIN:
        return "the model quantised, or fine-tuned"
    return "another base model"


def _leading_side(factors: Factors, sigma: SigmaPlacement) -> tuple[Tensor, Tensor]:
    """In fp64: the rows that are orthonormal, Uᵀ (or Vᵀ with "B"), and their product with W (or Wᵀ)."""
    a, bt = factors.a.double(), factors.bt.double()
    if sigma == "A":
        return bt, a
    if sigma == "B":
        return a, bt
    root = factors.s.double().sqrt()[:, None]
    return torch.where(root > 0, bt / root, 0.0), a * root


def _project(rows: Tensor, count: int) -> Tensor:
    """fp64 [r, count] projections of rows [r, n] on fixed vectors, of size about 1, on the CPU."""
    probe = probes(count, rows.shape[-1], ANCHOR, device=rows.device, dtype=torch.float64) / PROBE_STD
    return (rows @ probe.mT).cpu()
