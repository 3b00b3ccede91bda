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

from .contract import accumulate_dtype
from .philox import keep_mask


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
    q = _apply_pages(p, pages, slots)
    flat = _rows(y)
    out = (flat.to(acc) + scale * (q @ b.to(acc).T)).to(y.dtype)
    if slots is not None:
        # A base row stays what it was to the last bit: −0.0 + 0.0 would already change it.
        out = torch.where((slots >= 0)[:, None], out, flat)
    return out.reshape(y.shape), p


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
    pages = pages.to(p.dtype)
    if slots is None:
        return p @ pages[0].T
    chosen = pages[slots.clamp_min(0).long()]
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
