"""The manifest: what it says, when it differs, what it refuses."""

from __future__ import annotations

import pytest
import torch

from loraxs_ext.store import Manifest

from . import stores


def test_a_manifest_survives_its_bytes() -> None:
    ours = stores.manifest()
    theirs = Manifest.from_bytes(*ours.to_bytes())
    assert theirs.digest == ours.digest and len(ours.digest) == 16
    assert (theirs.fingerprint, theirs.recipe, theirs.config) == (ours.fingerprint, ours.recipe, ours.config)
    assert all(torch.equal(theirs.sketches[key], ours.sketches[key]) for key in stores.KEYS)
    assert theirs.ranks == dict.fromkeys(stores.KEYS, stores.RANK)


def test_the_digest_differs_where_anything_does() -> None:
    ours = stores.manifest()
    nudged = {**ours.sketches, stores.KEYS[0]: ours.sketches[stores.KEYS[0]].nextafter(torch.tensor(9.0))}
    renamed = {f"x.{key}": sketch for key, sketch in ours.sketches.items()}
    others = [
        Manifest("f" * 16, ours.recipe, ours.config, ours.sketches),
        Manifest(ours.fingerprint, {"sigma": "B"}, ours.config, ours.sketches),
        Manifest(ours.fingerprint, ours.recipe, {}, ours.sketches),
        Manifest(ours.fingerprint, ours.recipe, ours.config, nudged),
        Manifest(ours.fingerprint, ours.recipe, ours.config, renamed),
    ]
    assert len({ours.digest, *(other.digest for other in others)}) == 6
    backwards = dict(reversed(ours.sketches.items()))
    assert Manifest(ours.fingerprint, ours.recipe, ours.config, backwards).digest == ours.digest


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (torch.zeros(4, 2), r"expected torch.float32 \[5, r\], got torch.float32 \[4, 2\]"),
        (torch.zeros(5, 0), r".*got torch.float32 \[5, 0\]"),
        (torch.zeros(5), r".*got torch.float32 \[5\]"),
        (torch.zeros(5, 2, dtype=torch.float64), ".*got torch.float64"),
        (torch.full((5, 2), torch.nan), "expected finite numbers"),
    ],
    ids=["rows", "rank", "flat", "dtype", "nan"],
)
def test_a_bad_sketch_is_refused(sketch: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"sketches: m: {message}"):
        Manifest("", {}, {}, {"m": sketch})


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(TypeError):
        Manifest("", {}, {"target_modules": {"a", "b"}}, {})
