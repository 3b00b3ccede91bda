"""loraxs::gram_product: against fp64, in any layout, with any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import reference

from .problems import assert_within_twice, threads

gram_product = torch.ops.loraxs.gram_product.default

# (batch, l, m, n): blocks of rows with and without remainders, fewer rows than parts, strips of one row.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 8, 70, 130), (3, 4, 1030, 65), (1, 9, 33, 1100), (2, 17, 600, 40)]
EMPTY = [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)]


def problem(batch: int, l: int, m: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:  # noqa: E741
    generator = torch.Generator().manual_seed(l * m + n)
    return (
        torch.randn(batch, l, n, generator=generator).to(dtype),
        torch.randn(batch, m, n, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_error_within_twice_plain_torch(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, weight = problem(*shape, dtype=dtype)
    exact = reference.gram_product(x.double(), weight.double())
    assert_within_twice(gram_product(x, weight), reference.gram_product(x, weight), exact, "x WᵀW")


@pytest.mark.parametrize("shape", [*EMPTY, SHAPES[1]], ids=str)
def test_opcheck_and_empty_problems(shape: tuple[int, int, int, int]) -> None:
    x, weight = problem(*shape)
    torch.library.opcheck(gram_product, (x, weight))
    assert torch.equal(gram_product(x, weight), reference.gram_product(x, weight)) or 0 not in shape


def test_any_strides() -> None:
    x, weight = problem(2, 5, 60, 40)
    expected = gram_product(x, weight)
    assert torch.equal(gram_product(x.mT.contiguous().mT, weight.mT.contiguous().mT), expected)


def test_threads_and_batches_change_no_bit() -> None:
    x, weight = problem(3, 8, 500, 300)
    with threads(1):
        alone = gram_product(x, weight)
    with threads(2):
        assert torch.equal(gram_product(x, weight), alone)
    assert torch.equal(gram_product(x[1:2], weight[1:2]), alone[1:2])


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 4, 5), r"weight: expected shape \[batch=1, m=4, n=3\], got \[1, 4, 5\]"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 4, 3).double(), "weight: expected dtype"),
        (torch.zeros(2, 3), torch.zeros(1, 4, 3), r"x: expected shape \[batch, l, n"),
    ],
    ids=["shape", "dtype", "dimensions"],
)
def test_refusals_name_the_argument(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        gram_product(x, weight)
