from __future__ import annotations

import pytest
import torch

from loraxs_ext.basis.probes import probes
from loraxs_ext.ops.philox import philox4x32, random_u32

# Published known answers of Philox4x32-10 (Random123, kat_vectors): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    lanes = philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(lane) for lane in lanes) == expected


def test_bits_of_the_sketch() -> None:
    # Row 0, columns 0…3 of seed 0, stream 0 are the first known answer; the entry is its number of ones less 16.
    assert probes(1, 4, 0, dtype=torch.float32).tolist() == [[x.bit_count() - 16.0 for x in KNOWN[0][2]]]
    bits = random_u32(3, 50, 77, 4)
    expected = [[x.bit_count() - 16.0 for x in row] for row in bits.tolist()]
    assert probes(3, 50, 4, seed=77, dtype=torch.float64).tolist() == expected


def test_entries_depend_on_their_place_alone() -> None:
    large = probes(20, 300, 1, seed=5, dtype=torch.float32)
    assert torch.equal(large[:7, :33], probes(7, 33, 1, seed=5, dtype=torch.float32))
    assert not torch.equal(large, probes(20, 300, 2, seed=5, dtype=torch.float32))
    assert not torch.equal(large, probes(20, 300, 1, seed=6, dtype=torch.float32))


def test_entries_are_exact_in_small_types_and_of_variance_8() -> None:
    values = probes(64, 1024, 0, dtype=torch.float32)
    assert torch.equal(values.bfloat16().float(), values) and torch.equal(values.half().float(), values)
    assert abs(float(values.mean())) < 0.05 and abs(float(values.var()) - 8) < 0.2
