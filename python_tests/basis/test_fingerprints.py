from __future__ import annotations

import math

import pytest
import torch

from loraxs_ext.basis import fingerprint

from .matrices import gaussian

W = gaussian(131, 77)


def changed(index: tuple[int, int], value: float) -> torch.Tensor:
    other = W.clone()
    other[index] = value
    return other


def test_known_value() -> None:
    """The hash is part of files: it must be the same on every platform and for ever."""
    assert fingerprint(torch.arange(5000, dtype=torch.float32).reshape(50, 100)) == "691647013efe3827"
    assert fingerprint(torch.zeros(0, 3)) == "b76a2cc8eeb676cb"


def test_layout_and_exact_dtype_do_not_matter() -> None:
    expected = fingerprint(W)
    wide = torch.zeros(131, 200)
    wide[:, 1:78] = W
    assert fingerprint(wide[:, 1:78]) == fingerprint(W.mT.contiguous().mT) == fingerprint(W.double()) == expected
    assert fingerprint(torch.cat([torch.zeros(1), W.flatten()])[1:].view(131, 77)) == expected
    half = W.bfloat16()
    assert fingerprint(half) == fingerprint(half.float()) == fingerprint(half.double()) != expected
    assert fingerprint(torch.nn.Parameter(W)) == expected


def test_thread_count_does_not_matter() -> None:
    large = gaussian(600, 700)
    threads = torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(fingerprint(large))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("index", [(0, 0), (0, 1), (64, 13), (130, 76)])
def test_one_ulp_is_seen(index: tuple[int, int]) -> None:
    ulp = torch.nextafter(W[index], torch.tensor(math.inf))
    assert fingerprint(changed(index, float(ulp))) != fingerprint(W)
    double = W.double()
    double[index] *= 1 + 2**-50
    assert fingerprint(double) != fingerprint(W)


def test_order_signs_and_shape_are_seen() -> None:
    others = (W, -W, W.abs(), W.mT, W.reshape(77, 131), W.flatten(), W[None], W[torch.arange(131).roll(1)])
    seen = {fingerprint(other) for other in others}
    for i, j in ((0, 1), (0, 2), (1, 3), (4096, 0), (5000, 9000)):
        swapped = W.flatten().clone()
        swapped[i], swapped[j] = W.flatten()[j], W.flatten()[i]
        seen.add(fingerprint(swapped.view(131, 77)))
        # Flipped sign bits would cancel in a hash that moves bits only upwards.
        flipped = W.flatten().clone()
        flipped[[i, j]] *= -1
        seen.add(fingerprint(flipped.view(131, 77)))
    assert len(seen) == 18


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="int8"):
        fingerprint(torch.zeros(3, dtype=torch.int8))
