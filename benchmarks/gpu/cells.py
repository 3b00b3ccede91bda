"""What is measured, the most valuable cells first, so that a deadline cuts the least valuable."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("decode", "prefill", "training", "edora", "stacked")
# Measured beside the cells: the bases of whole models (`basis.measure`), a decoder that serves (`serving.measure`).
BASIS, SERVING = "basis", "serving"

# (N, K): square, up, down and key/value projections of an 8B model.
WIDTHS = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
DECODE_TOKENS = (64, 1, 8, 32, 128, 256)
LONG_TOKENS = (4096, 512, 16384)
RANKS = (16, 64, 4)

# In prefill every sequence of this many tokens has its own adapter.
SEQUENCE = 128


@dataclass(frozen=True)
class Cell:
    """One row of the result: a kind of work at one shape.

    Attributes:
        kind: "decode" (forward, every row its own adapter), "prefill" (forward, every sequence its own adapter),
            "training" (forward and backward, one adapter), "edora" (forward with its row scale, one adapter) or
            "stacked" (three layers that read one x).
        M, N, K, r: tokens, d_out, d_in, rank.
        dtype: of activations and weights.
    """

    kind: str
    M: int
    N: int
    K: int
    r: int
    dtype: str = "bfloat16"

    @property
    def adapters(self) -> int:
        """S, how many adapters the batch mixes."""
        if self.one_adapter:
            return 1
        return self.M if self.kind == "decode" or self.M < SEQUENCE else self.M // SEQUENCE

    @property
    def one_adapter(self) -> bool:
        """Training has one adapter, and EDoRA's row scale changes only while one is trained."""
        return self.kind in ("training", "edora")

    @property
    def backward(self) -> bool:
        return self.kind == "training"

    @property
    def weight_sets(self) -> int:
        """How many sets of weights rotate, so that a small problem does not run out of the L2 cache.

        Long batches move activations that outgrow the cache by themselves.
        """
        if self.dtype == "float32":
            return 2
        return 8 if self.M <= 256 and self.N * self.K >= 2**24 else 16 if self.M <= 256 else 4

    def __str__(self) -> str:
        return f"{self.kind} M{self.M} {self.K}->{self.N} r{self.r}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "adapters": self.adapters, "weight_sets": self.weight_sets}


def named_cells() -> list[Cell]:
    """What targets speak of, the first of them at the shape that most people ask about."""
    first, *others = WIDTHS
    return [
        *(Cell("decode", M, *first, r) for r in (16, 64) for M in DECODE_TOKENS[:4]),
        *(Cell("prefill", 4096, *first, r) for r in (16, 64)),
        Cell("training", 4096, *first, 16),
        *(Cell("edora", M, *first, 16) for M in (4096, 64)),
        # At 64 distinct adapters every shape must beat gathered LoRA.
        *(Cell("decode", 64, *width, r) for width, r in itertools.product(others, RANKS)),
        *(Cell("stacked", M, *first, 16) for M in (4096, 64)),
    ]


def plan(kinds: tuple[str, ...] = KINDS) -> list[Cell]:
    """All cells of `kinds` in the order of their value: `named_cells`, then one width after the other."""
    rest = [
        cell
        for width in WIDTHS
        for cell in (
            *(Cell("prefill", M, *width, r) for r in RANKS for M in LONG_TOKENS),
            *(Cell("training", M, *width, r) for r in RANKS for M in LONG_TOKENS),
            *(Cell("decode", M, *width, r) for r in RANKS for M in DECODE_TOKENS),
        )
    ]
    return [cell for cell in dict.fromkeys([*named_cells(), *rest]) if cell.kind in kinds]


def dry_plan(kinds: tuple[str, ...] = KINDS) -> list[Cell]:
    """One tiny cell of every kind, for a walk through the whole code without a GPU. Triton's interpreter is right in
    fp32."""
    cells = [
        Cell("decode", 5, 48, 40, 4, "float32"),
        Cell("prefill", 136, 40, 48, 4, "float32"),
        Cell("training", 6, 48, 40, 3, "float32"),
        Cell("edora", 4, 48, 40, 4, "float32"),
        Cell("stacked", 4, 32, 40, 4, "float32"),
    ]
    return [cell for cell in cells if cell.kind in kinds]
