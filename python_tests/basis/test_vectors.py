from __future__ import annotations

import pytest
import torch

from loraxs_ext.basis import randomized_svd
from loraxs_ext.basis.exact import vector_order

from .matrices import defect, gaussian, power_law

CHOICES = ["top", "middle", "bottom", "random"]


def test_orders() -> None:
    assert vector_order(5, "top", 0).tolist() == [0, 1, 2, 3, 4]
    assert vector_order(5, "bottom", 0).tolist() == [4, 3, 2, 1, 0]
    assert vector_order(5, "middle", 0).tolist() == [2, 1, 3, 0, 4]
    assert vector_order(4, "middle", 0).tolist() == [1, 2, 0, 3]


def test_random_order_is_a_permutation_of_its_seed() -> None:
    order = vector_order(200, "random", 3)
    assert sorted(order.tolist()) == list(range(200))
    assert torch.equal(order, vector_order(200, "random", 3))
    assert not torch.equal(order, vector_order(200, "random", 4))


@pytest.mark.parametrize("vectors", CHOICES)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=["tall", "wide"])
def test_chosen_vectors_are_singular_vectors(vectors: str, shape: tuple[int, int]) -> None:
    W = power_law(*shape, 0.5).float()
    found, measured = randomized_svd(W, 7, vectors=vectors, seed=2, diagnostics=True)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    order = vector_order(40, vectors, 2)[:7]
    assert float((found.S - S[order]).abs().max()) < 1e-6
    assert float(((found.U.double() * U[:, order]).sum(0).abs() - 1).abs().max()) < 1e-6
    assert float(((found.Vh.double() * Vh[order]).sum(1).abs() - 1).abs().max()) < 1e-6
    assert float(measured.subspace_error) < 1e-4


@pytest.mark.parametrize("vectors", CHOICES)
def test_ranks_are_nested(vectors: str) -> None:
    W = gaussian(60, 90)
    small, large = (randomized_svd(W, rank, vectors=vectors) for rank in (5, 12))
    assert float((small.U - large.U[:, :5]).abs().max()) < 1e-5
    assert float((small.Vh - large.Vh[:5]).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_bottom_of_a_singular_matrix_lies_in_its_null_space(dtype: torch.dtype) -> None:
    W = (gaussian(60, 5).double() @ gaussian(5, 40, seed=1).double()).to(dtype)
    found = randomized_svd(W, 4, vectors="bottom")
    assert defect(found.U) < 1e-6 and defect(found.Vh.mT) < 1e-6
    assert float(found.S.max()) < 1e-5
    assert float((found.U.mT @ W).abs().max()) < 1e-5 and float((W @ found.Vh.mT).abs().max()) < 1e-5


@pytest.mark.parametrize("vectors", CHOICES)
def test_zero_matrix(vectors: str) -> None:
    found, measured = randomized_svd(torch.zeros(30, 20), 6, vectors=vectors, diagnostics=True)
    assert torch.equal(found.S, torch.zeros(6)) and defect(found.U) < 1e-6 and defect(found.Vh.mT) < 1e-6
    assert float(measured.subspace_error) < 1e-5
