"""Random problems of the op contract, and the rule every owner is held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops.contract import accumulate_dtype
from loraxs_ext.ops.philox import keep_mask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# (M, K, N, r, S): odd widths, ranks that are no power of two, one token, one slot, more slots than tokens,
# more tokens than are packed at once.
SHAPES = {
    "one token": (1, 64, 48, 4, 1),
    "rank 1": (7, 33, 17, 1, 3),
    "odd widths": (13, 2049, 127, 5, 4),
    "rank 100": (40, 130, 200, 100, 2),
    "many slots": (9, 48, 64, 16, 31),
    "tall": (150, 96, 64, 16, 3),
    "several chunks": (300, 2049, 70, 20, 3),
}


@dataclass
class Problem:
    """One call of `loraxs::linear`: tensors by argument name, so that tests can change one of them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    pages: Tensor
    slots: Tensor | None
    scale: float = 0.7
    p_drop: float = 0.0
    rng: Tensor | None = None
    dy: Tensor = field(default_factory=lambda: torch.empty(0))

    def forward_args(self) -> tuple:
        return (self.x, self.weight, self.bias, *self.low_rank_args())

    def low_rank_args(self) -> tuple:
        return self.a, self.b, self.pages, self.slots, self.scale, self.p_drop, self.rng

    def backward_args(self, p: Tensor) -> tuple:
        return (
            self.dy, self.weight, self.a, self.b, self.pages, self.slots, p, self.scale, self.p_drop, self.rng,
            True, True,
        )  # fmt: skip

    def to(self, dtype: torch.dtype, pages_dtype: torch.dtype | None = None) -> Problem:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        return Problem(
            cast(self.x), cast(self.weight), cast(self.bias), cast(self.a), cast(self.b),
            self.pages.to(pages_dtype or dtype), self.slots, self.scale, self.p_drop, self.rng, cast(self.dy),
        )  # fmt: skip


def make(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    slots: str | None = None,
    p_drop: float = 0.0,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    """A problem with values that make the low-rank part as large as the base, so that its errors are seen.

    `slots`: None, "mixed" (uniform over −1 and all slots), "base" (all −1) or "skewed" (nearly all in the last slot).
    """
    M, K, N, r, S = shape
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    chosen = None
    if slots == "mixed":
        chosen = torch.randint(-1, S, (M,), generator=g, dtype=torch.int32)
    elif slots == "base":
        chosen = torch.full((M,), -1, dtype=torch.int32)
    elif slots == "skewed":
        chosen = torch.full((M,), S - 1, dtype=torch.int32)
        chosen[0] = 0 if M > 1 else S - 1
    problem = Problem(
        x=randn(M, K),
        weight=randn(N, K) / K**0.5,
        bias=randn(N) if bias else None,
        a=randn(r, K) / K**0.5,
        b=randn(r, N).mT / N**0.5,
        pages=randn(S, r, r) * (N / r) ** 0.5,
        slots=chosen,
        p_drop=p_drop,
        rng=torch.tensor([2**40 + 11, 3]) if p_drop else None,
        dy=randn(M, N),
    )
    return problem.to(dtype)


def amid_others(t: Tensor) -> Tensor:
    """The same numbers and strides inside a larger memory, with NaN before and after them."""
    return t.new_full((3 + t.numel() + 5,), torch.nan).as_strided(t.shape, t.stride(), 3).copy_(t)


def in_slab(pages: Tensor, before: int = 3, after: int = 5) -> Tensor:
    """The same pages as the rows of a slab hold them: each contiguous, with NaN before and after it."""
    S, r, _ = pages.shape
    rows = pages.new_full((S, before + r * r + after), torch.nan)
    view = rows[:, before : before + r * r].view(S, r, r)
    return view.copy_(pages)


def far_apart(pages: Tensor) -> Tensor:
    """The same pages in a slab whose last page begins beyond 2^31 numbers; only the pages take up memory.

    Skips the test where so much address space is not to be had.
    """
    S, r, _ = pages.shape
    row = 2**31 // (S - 1) + 8
    try:
        rows = torch.empty((S - 1) * row + r * r, dtype=pages.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for a large slab: {error}")
    return rows.as_strided((S, r, r), (row, r, 1)).copy_(pages)


def naive_linear(p: Problem) -> Tensor:
    """Three matmuls in the dtype of x, as a user would write them: the yardstick of the 2× rule."""
    x = p.x * keep_mask(*p.x.shape, p.p_drop, p.rng) / (1 - p.p_drop) if p.p_drop else p.x
    low = x @ p.a.T
    pages = p.pages.to(p.x.dtype)
    if p.slots is None:
        q = low @ pages[0].T
    else:
        q = torch.bmm(pages[p.slots.clamp_min(0).long()], low.unsqueeze(-1)).squeeze(-1)
        q = q * (p.slots >= 0)[:, None]
    return torch.nn.functional.linear(p.x, p.weight, p.bias) + p.scale * (q @ p.b.T)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_within_twice(got: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Error against fp64 at most twice plain torch's in that dtype.

    Three roundings of the accumulation dtype are free: in results of a few numbers plain torch can be right by luck.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(got).all(), f"{what}: not finite"
    floor = 3 * torch.finfo(accumulate_dtype(got.dtype)).eps
    ours, theirs = error(got, exact), error(plain, exact)
    assert ours <= 2 * theirs + floor, f"{what}: error {ours:.3e} exceeds twice plain torch's {theirs:.3e}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch computes with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
