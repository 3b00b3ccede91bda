"""The plain-torch meaning of every op: the oracle of all tests, and the owner where no faster one is built.

With M tokens, K = d_in, N = d_out, rank r and S slots (LoRA-XS, Bałazy et al. 2024, eq. 1; batched over adapters):

    p = drop(x) aᵀ,   q_m = R_slot(m) p_m,   y = x Wᵀ + bias + s · q bᵀ

Sums run in fp32 for half types (fp64 for fp64); y is rounded to the dtype of x once per addition.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import accumulate_dtype, check_rank
from .orthonormal import orthonormalize_rows
from .philox import keep_mask
from .probes import SIGN, probes


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + bias + s · ((drop(x) aᵀ) R_slotᵀ) bᵀ, with every token's R picked by its slot.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64.
        weight: [N, K], dtype of x, frozen.
        bias: [N] or None.
        a, b: [r, K] and [N, r], dtype of x: the frozen basis.
        pages: [S, r, r], dtype of x or fp32: one R a slot.
        slots: int32 [M] with values in [-1, S); −1 is the base model; None means slot 0 for every token.
        scale: s, the adapter's scaling.
        p_drop: probability of dropping an entry of x on the low-rank path, in [0, 1).
        rng: int64 [2] = (seed, offset) of the dropout mask (`philox.keep_mask`); needed when p_drop > 0.

    Returns:
        y [..., N] in the dtype of x, and p = drop(x) aᵀ [M, r] in the accumulation dtype, saved for the backward.
    """
    y = F.linear(x, weight, bias).contiguous()
    return add_delta(y, x, a, b, pages, slots, scale, p_drop, rng)


def add_delta(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y + s · ((drop(x) aᵀ) R_slotᵀ) bᵀ and p; arguments as in `linear`, with y [..., N] in the dtype of x."""
    acc = accumulate_dtype(x.dtype)
    p = _drop(_rows(x).to(acc), p_drop, rng) @ a.to(acc).T
    return _add_projected(y, p, b, pages, slots, scale), p


def linear_backward(
    dy: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    p: Tensor,
    scale: float,
    p_drop: float,
    rng: Tensor | None,
    need_dx: bool,
    need_dpages: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `linear` (of `add_delta`, without its dy for y, when weight is None).

    dq = s · dy b,  dR_i = Σ_{m in slot i} dq_mᵀ p_m,  dx = dy W + mask/(1 − p_drop) · ((dq R) a).

    Args:
        dy: [..., N] gradient of y.
        p: [M, r] as saved by the forward.
        need_dx, need_dpages: what is not needed is returned as an empty tensor.
        weight, a, b, pages, slots, scale, p_drop, rng: as in the forward.

    Returns:
        dx [..., K] in the dtype of dy, and dpages [S, r, r] in the dtype of pages.
    """
    acc = accumulate_dtype(dy.dtype)
    rows = _rows(dy)
    dq = scale * (rows.to(acc) @ b.to(acc))
    dx, dpages = dy.new_empty(0), pages.new_empty(0)
    if need_dpages:
        dpages = _sum_pages(dq, p, pages.shape[0], slots).to(pages.dtype)
    if need_dx:
        dlow = _apply_pages(dq, pages.mT, slots) @ a.to(acc)
        flat = _drop(dlow, p_drop, rng)
        if weight is not None:
            flat = (rows @ weight).to(acc) + flat
        dx = flat.to(dy.dtype).reshape(*dy.shape[:-1], a.shape[1])
    return dx, dpages


def add_delta_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
) -> None:
    """`add_delta` written into y."""
    y.copy_(add_delta(y, x, a, b, pages, slots, scale, p_drop, rng)[0])


def project(x: Tensor, a: Tensor) -> Tensor:
    """p = x aᵀ [M, r] in the accumulation dtype, for x [..., K] and a [r, K]: what `linear` projects without dropout.

    a may be the bases of several layers that read one x, one below the other; each then takes its columns of p.
    """
    acc = accumulate_dtype(x.dtype)
    return _rows(x).to(acc) @ a.to(acc).T


def linear_projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: Tensor,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    """y of `linear` for a p = x aᵀ that is known already.

    Args:
        p: [M, r] in the accumulation dtype, of any strides.
        a: the basis that p was projected with; only the backward reads it.
        x, weight, bias, b, pages, slots, scale: as in `linear`.
    """
    return _add_projected(F.linear(x, weight, bias).contiguous(), p, b, pages, slots, scale)


def row_scale(
    rho: Tensor,
    b: Tensor,
    pages: Tensor,
    sigma: Tensor | None,
    m: Tensor,
    scale: float,
    c: Tensor | None = None,
    root: Tensor | None = None,
    through_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """g_i = m_i / ‖w_i + s · b_i R a‖ for the rows w_i of W, from what is cached of W: O(N r²), nothing of width K.

    Let a = L Qᵀ with orthonormal columns in Q. Then w_i + s b_i R a has the component w_i − w_i Q Qᵀ outside the row
    space of a, which no R changes, and the coordinates w_i Q + s b_i R L within it. Two squares are added and none is
    subtracted, so nothing cancels, not even as R → −I/s (cf. EDoRA, Nasiri and Garraghan 2025; DoRA, Liu et al. 2024):

        t_i = c_i + s b_i R L,  ‖·‖² = ρ_i + ‖t_i‖²,  ρ_i = ‖w_i − c_i Qᵀ‖²,  c = W Q,  L Lᵀ = a aᵀ

    Args:
        rho: [N], fp32 (fp64 for fp64): ρ. Compute it as the norm of the difference, in fp64; ‖w_i‖² − ‖c_i‖² is equal.
        b: [N, r], fp32, bf16, fp16 or fp64.
        pages: [S, r, r], dtype of b or fp32: one R a slot.
        sigma: [r], dtype of rho. Without c and root, the basis is a converged one: a = Σ Vᵀ, b = U when sigma is
            given, so that c = b Σ and L = Σ; a = Vᵀ, b = U Σ when it is None, so that c = b and L = 1.
        m: [S, N], dtype of b or fp32: one magnitude vector a slot.
        scale: s, the adapter's scaling.
        c, root: [N, r] and [r, r], dtype of rho: c and L of any basis; both or neither.
        through_norm: whether the backward differentiates the norm too; it changes nothing here.

    Returns:
        g [S, N] in the dtype of m, and 1 / ‖·‖ [S, N] in the dtype of rho. A row without length gets zeros.
    """
    t = _coordinates(b, pages, sigma, scale, c, root)
    inverse_norm = _inverse(torch.sqrt(rho + t.square().sum(-1)))
    return (m.to(rho.dtype) * inverse_norm).to(m.dtype), inverse_norm


def row_scale_backward(
    dg: Tensor,
    inverse_norm: Tensor,
    b: Tensor,
    pages: Tensor,
    sigma: Tensor | None,
    m: Tensor,
    scale: float,
    c: Tensor | None,
    root: Tensor | None,
) -> Tensor:
    """Gradient of `row_scale` for the pages: dR = −s · bᵀ diag(dg · m / ‖·‖³) t Lᵀ, in the dtype of pages.

    Args:
        dg: [S, N] gradient of g.
        inverse_norm: [S, N] as returned by the forward.
        b, pages, sigma, m, scale, c, root: as in the forward.
    """
    acc = accumulate_dtype(b.dtype)
    weights = dg.to(acc) * m.to(acc) * inverse_norm**3
    t = _coordinates(b, pages, sigma, scale, c, root)
    if root is not None:
        t = t @ root.T
    elif sigma is not None:
        t = t * sigma
    return (-scale * (b.to(acc).T @ (weights[:, :, None] * t))).to(pages.dtype)


def rescale(z: Tensor, g: Tensor, slots: Tensor | None, bias: Tensor | None) -> Tensor:
    """y_m = g_slot(m) ∘ z_m + bias: what a magnitude makes of the output of its layer, in one pass over it.

    Args:
        z: [..., N], fp32, bf16, fp16 or fp64.
        g: [S, N], dtype of z or fp32: one factor an output and slot.
        slots: int32 [M] with values in [-1, S); −1 stands for a factor of 1; None means slot 0 for every token.
        bias: [N] in the dtype of z, or None.

    Returns:
        y [..., N] in the dtype of z, computed in the accumulation dtype and rounded once.
    """
    acc = accumulate_dtype(z.dtype)
    y = _rows(z).to(acc) * _factors(g, slots, acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(z.dtype).reshape(z.shape)


def rescale_backward(
    dy: Tensor, z: Tensor | None, g: Tensor, slots: Tensor | None, need_dz: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `rescale`: dz_m = g_slot(m) ∘ dy_m,  dg_s = Σ_{m in slot s} dy_m ∘ z_m.

    Args:
        dy: [..., N] gradient of y.
        z: [..., N] as in the forward; None where dg is not needed.
        g, slots: as in the forward.
        need_dz: what is not needed is returned as an empty tensor.

    Returns:
        dz [..., N] in the dtype of dy, and dg [S, N] in the dtype of g.
    """
    acc = accumulate_dtype(dy.dtype)
    rows = _rows(dy).to(acc)
    dz, dg = dy.new_empty(0), g.new_empty(0)
    if need_dz:
        dz = (rows * _factors(g, slots, acc)).to(dy.dtype).reshape(dy.shape)
    if z is not None:
        products, sums = rows * _rows(z).to(acc), rows.new_zeros(g.shape)
        if slots is None:
            sums[0] = products.sum(0)
        else:
            # `index_put_` with accumulate keeps a fixed order on every device.
            products = torch.where((slots >= 0)[:, None], products, 0)
            sums.index_put_((slots.clamp_min(0).long(),), products, accumulate=True)
        dg = sums.to(g.dtype)
    return dz, dg


def _factors(g: Tensor, slots: Tensor | None, acc: torch.dtype) -> Tensor:
    """g of every token's slot, 1 for base rows: [N] or [M, N]."""
    if slots is None:
        return g[0].to(acc)
    return torch.where((slots >= 0)[:, None], g[slots.clamp_min(0).long()].to(acc), 1)


def _coordinates(
    b: Tensor, pages: Tensor, sigma: Tensor | None, scale: float, c: Tensor | None, root: Tensor | None
) -> Tensor:
    """t [S, N, r]: the rows of W + s b R a within the row space of a."""
    acc = accumulate_dtype(b.dtype)
    b = b.to(acc)
    moved = scale * (b @ pages.to(acc))
    if c is not None and root is not None:
        return c + moved @ root
    return b + moved if sigma is None else (b + moved) * sigma


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm, and 0 for a row of zeros, which has no direction to scale."""
    return torch.where(norm > 0, 1 / norm, 0)


def _add_projected(y: Tensor, p: Tensor, b: Tensor, pages: Tensor, slots: Tensor | None, scale: float) -> Tensor:
    """y + s · (p R_slotᵀ) bᵀ."""
    flat, q = _rows(y), _apply_pages(p, pages, slots)
    out = (flat.to(p.dtype) + scale * (q @ b.to(p.dtype).T)).to(y.dtype)
    if slots is not None:
        # A base row stays what it was to the last bit: −0.0 + 0.0 would already change it.
        out = torch.where((slots >= 0)[:, None], out, flat)
    return out.reshape(y.shape)


def gram_product(x: Tensor, weight: Tensor) -> Tensor:
    """(x Wᵀ) W for few rows x: one step of a Krylov iteration on the Gram matrix WᵀW.

    Args:
        x: [batch, l, n].
        weight: [batch, m, n], dtype of x.

    Returns:
        [batch, l, n] in the dtype of x, contiguous.
    """
    return ((x @ weight.mT) @ weight).contiguous()


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal columns that span, for every i, what the first i columns of Y span.

    Args:
        Y: [batch, n, k], finite, k ≤ n. Columns that depend on earlier ones are replaced by vectors orthogonal to all
            others, which depend on n, k and the column only.

    Returns:
        [batch, n, k] in Y's dtype, fp32 for half types; stored as rows.

    Raises:
        ValueError: NaN or Inf in Y. A GPU owner does not wait for the device to find out and returns NaN.
    """
    if Y.numel() == 0:
        return Y.new_empty(Y.mT.shape, dtype=accumulate_dtype(Y.dtype)).mT
    return orthonormalize_rows(Y.mT).contiguous().mT


def randomized_svd(
    W: Tensor, rank: int, n_oversamples: int = 32, tol: float = 1e-3, max_iter: int = 100, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, from a complete decomposition: what an iteration must agree with up to `tol`.

    Args:
        W: [batch, N, K], finite.
        rank: triplets r, between 1 and min(N, K).
        n_oversamples, tol, max_iter, seed: of an owner that iterates: vectors beyond the rank, the largest sine of an
            angle between computed and true subspaces, its number of steps at most, and the seed of its start.

    Returns:
        U [batch, N, r], stored as rows, S [batch, r] descending and Vh [batch, r, K] in W's dtype, fp32 for half types.
        Signs are such that ⟨u_i, h⟩ ≥ 0 for a fixed pseudo-random h, which rounding of W hardly ever turns.
    """
    check_rank(W, rank)
    if not bool(torch.isfinite(W).all()):
        raise ValueError("loraxs::randomized_svd: W: expected finite values, got NaN or Inf")
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    left, right = U[..., :rank].mT, Vh[:, :rank]
    probe = probes(1, W.shape[1], SIGN, device=W.device, dtype=torch.float64)[0]
    sign = torch.where(left @ probe < 0, -1.0, 1.0)[..., None]
    acc = accumulate_dtype(W.dtype)
    left, right = ((rows * sign).to(acc).contiguous() for rows in (left, right))
    return left.mT, S[:, :rank].to(acc).contiguous(), right


def _rows(t: Tensor) -> Tensor:
    """[..., n] → [M, n]; M is spelled out because −1 is ambiguous when n is 0."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _drop(rows: Tensor, p_drop: float, rng: Tensor | None) -> Tensor:
    """Inverted dropout with the recomputable mask of the contract."""
    if p_drop == 0.0:
        return rows
    if rng is None:
        raise ValueError(f"rng: expected int64 [2] = (seed, offset) because p_drop is {p_drop}, got None")
    return rows * keep_mask(rows.shape[0], rows.shape[1], p_drop, rng) / (1.0 - p_drop)


def _apply_pages(p: Tensor, pages: Tensor, slots: Tensor | None) -> Tensor:
    """q_m = R_slot(m) p_m; zero where the slot is −1."""
    if slots is None:
        return p @ pages[0].to(p.dtype).T
    # Chosen first, then widened: a table may hold many more pages than there are tokens.
    chosen = pages[slots.clamp_min(0).long()].to(p.dtype)
    q = torch.bmm(chosen, p.unsqueeze(-1)).squeeze(-1)
    return q.masked_fill((slots < 0)[:, None], 0.0)


def _sum_pages(dq: Tensor, p: Tensor, n_slots: int, slots: Tensor | None) -> Tensor:
    """dR_i = Σ dq_mᵀ p_m over the rows of slot i; `index_put_` with accumulate keeps a fixed order on every device."""
    if slots is None:
        first = dq.T @ p
        return torch.cat([first[None], first.new_zeros(n_slots - 1, *first.shape)]) if n_slots > 1 else first[None]
    here = slots >= 0
    outer = dq[:, :, None] * p[:, None, :] * here[:, None, None]
    sums = p.new_zeros(n_slots, p.shape[1], p.shape[1])
    return sums.index_put_((slots.clamp_min(0).long(),), outer, accumulate=True)
