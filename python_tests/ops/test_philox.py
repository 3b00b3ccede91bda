"""Philox against its authors' published vectors, and the properties dropout and sketches rest on."""

import pytest
import torch

from loraxs_ext.ops.philox import drop_threshold, keep_mask, philox4x32, random_u32

# Known-answer tests of Random123 1.09 (kat_vectors, philox4x32-10): counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter, key, expected):
    result = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert [int(lane) for lane in result] == expected


def test_bits_depend_on_position_seed_and_offset_alone():
    seed, offset = -7, 1 << 40
    wide = random_u32(9, 70, seed, offset)
    assert torch.equal(random_u32(4, 13, torch.tensor(seed), torch.tensor(offset)), wide[:4, :13])
    assert not torch.equal(random_u32(9, 70, seed + 1, offset), wide)
    assert not torch.equal(random_u32(9, 70, seed, offset + 1), wide)
    assert 0 <= int(wide.min()) and int(wide.max()) < 2**32


@pytest.mark.parametrize("p_drop", [0.0, 0.1, 0.5, 0.99])
def test_mask_keeps_the_expected_share(p_drop):
    keep = keep_mask(400, 501, p_drop, torch.tensor([3, 0]))
    spread = (p_drop * (1 - p_drop) / keep.numel()) ** 0.5
    assert abs(float(keep.double().mean()) - (1 - p_drop)) <= 5 * spread


def test_threshold_fits_32_bits():
    assert drop_threshold(0.0) == 0
    assert drop_threshold(1 - 1e-12) == 2**32 - 1
