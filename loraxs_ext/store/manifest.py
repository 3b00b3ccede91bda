"""The one basis that all adapters of a store stand on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

FORMAT = 1
_SKETCH_ROWS = 5


@dataclass(frozen=True, eq=False)
class Manifest:
    """What the adapters of a store have in common. Not to be changed once it is made.

    Args:
        fingerprint: 64 bits of the base weights, in hex, as LoraXSConfig.base_fingerprint; "" where unknown.
        recipe: how the basis is computed, as the fields of `loraxs_ext.Recipe`.
        config: fields of an adapter_config.json: what is targeted, at which rank.
        sketches: by module key, fp32 [5, r], `loraxs_ext.basis.sketch` of its basis; r is the largest rank that an
            adapter may have in this module.

    Raises:
        ValueError: a sketch has another shape, or is not finite.
        TypeError: a field cannot be written as JSON.
    """

    fingerprint: str
    recipe: Mapping[str, Any]
    config: Mapping[str, Any]
    sketches: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for key, sketch in self.sketches.items():
            fits = sketch.ndim == 2 and sketch.shape[0] == _SKETCH_ROWS and sketch.shape[1] >= 1
            if not fits or sketch.dtype != torch.float32:
                got = f"{sketch.dtype} {list(sketch.shape)}"
                raise ValueError(f"sketches: {key}: expected torch.float32 [{_SKETCH_ROWS}, r], got {got}")
            if not sketch.isfinite().all():
                raise ValueError(f"sketches: {key}: expected finite numbers, got NaN or infinity")
        self._text()

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """The largest rank by module key."""
        return {key: sketch.shape[1] for key, sketch in self.sketches.items()}

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ between manifests that differ; every record carries them."""
        digest = hashlib.blake2b(self._text().encode(), digest_size=16)
        for key in sorted(self.sketches):
            sketch: Any = self.sketches[key].contiguous().cpu()
            digest.update(json.dumps([key, sketch.shape[1]]).encode())
            digest.update(sketch.numpy().tobytes())
        return digest.digest()

    def to_bytes(self) -> tuple[bytes, bytes]:
        """The fields as JSON, the sketches as safetensors."""
        return self._text().encode(), save({key: sketch.contiguous().cpu() for key, sketch in self.sketches.items()})

    @classmethod
    def from_bytes(cls, text: bytes, sketches: bytes) -> Manifest:
        """Read what `to_bytes` made, or refuse.

        Raises:
            ValueError: the bytes are anything else.
        """
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        kinds = {"fingerprint": str, "recipe": dict, "config": dict}
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            got = fields.get("format") if isinstance(fields, dict) else f"{text!r:.60}"
            raise ValueError(f"manifest: expected format {FORMAT}, got {got!r}")
        for name, kind in kinds.items():
            if not isinstance(fields.get(name), kind):
                raise ValueError(f"manifest: {name}: expected a {kind.__name__}, got {fields.get(name)!r:.60}")
        try:
            tensors = load(sketches)
        except SafetensorError as reason:
            raise ValueError(f"manifest: sketches: expected safetensors, got {reason}") from None
        return cls(**{name: fields[name] for name in kinds}, sketches=tensors)

    def _text(self) -> str:
        fields = {"fingerprint": self.fingerprint, "recipe": dict(self.recipe), "config": dict(self.config)}
        return json.dumps({"format": FORMAT, **fields}, sort_keys=True, separators=(",", ":"))
