"""R of one adapter in one layer, and the sketch of the basis it belongs to."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

InitWeights = bool | Literal["zeros"]

SKETCH_ROWS = 5


class CoreMatrix(nn.Module):
    """The trainable R [r, r] with what is stored beside it; or a stack [E, r, r] of them, and all of it stacked.

    In a state dict it is `loraxs_R.<adapter>.weight` and `.sketch`, and `.a`, `.bt` when the basis is kept with the
    adapter. R means nothing without its basis, so `settled` tells whether the sketch was compared with the layer's
    basis since it last came in from outside; the layer refuses to compute with a core that is not settled.

    Args:
        weight: [r, r] or [E, r, r], initial value of R.
        basis_shape: (K, N) to keep the basis with the adapter, None to keep its sketch only.
    """

    def __init__(self, weight: Tensor, basis_shape: tuple[int, int] | None = None) -> None:
        super().__init__()
        *stack, r, _ = weight.shape
        self.settled = False
        self.weight = nn.Parameter(weight)
        # NaN marks what was not recorded yet. `sketch` is a property, so it goes past register_buffer's name check.
        self._buffers["sketch"] = torch.full((*stack, SKETCH_ROWS, r), torch.nan)
        if basis_shape is not None:
            self.register_buffer("a", torch.full((*stack, r, basis_shape[0]), torch.nan))
            self.register_buffer("bt", torch.full((*stack, r, basis_shape[1]), torch.nan))

    @property
    def sketch(self) -> Tensor:
        """Sketch [5, r] of the basis in fp32.

        Whoever asks for the tensor may overwrite it in place (PEFT's hotswap does) or replace it (transformers'
        loader does), and neither tells the module. So asking for it unsettles the core; `recorded_sketch` does not.
        """
        self.settled = False
        return self.recorded_sketch

    @property
    def recorded_sketch(self) -> Tensor:
        """The sketch for reading only."""
        sketch = self._buffers["sketch"]
        assert sketch is not None
        return sketch

    @property
    def rank(self) -> int:
        """r."""
        return self.weight.shape[-1]

    @property
    def stored_basis(self) -> tuple[Tensor, Tensor] | None:
        """a [r, K] and bt [r, N] that came with R; None if none are kept, or none were recorded yet."""
        a, bt = self._buffers.get("a"), self._buffers.get("bt")
        if a is None or bt is None or not (a.isfinite().all() and bt.isfinite().all()):
            return None
        return a, bt

    @torch.no_grad()
    def record(self, sketch: Tensor, a: Tensor, bt: Tensor) -> None:
        """Note which basis R belongs to from now on: sketch [5, r], a [r, K], bt [r, N]."""
        self._buffers["sketch"] = sketch.to(self.weight.device, torch.float32).contiguous()
        if "a" in self._buffers:
            # Copies: the layer's basis may grow and move without this adapter.
            self._buffers["a"], self._buffers["bt"] = a.clone(), bt.clone()
        self.settled = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = {name: state_dict.get(prefix + name) for name in ("sketch", "a", "bt")}
        if any(new is not None and not _same(new, self._buffers.get(name)) for name, new in loaded.items()):
            self.settled = False
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> CoreMatrix:
        sketch = self.recorded_sketch
        super()._apply(fn, recurse)
        moved = self.recorded_sketch
        if moved.dtype != torch.float32:
            # A measurement, not a weight: rounding it to the model's dtype would blind the comparison.
            self._buffers["sketch"] = sketch.to(moved.device)
        return self


def initial_core(
    r: int, init: InitWeights, *, std: float, seed: int, key: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """R [r, r] before training, a function of its arguments alone, so that distributed ranks agree.

    Args:
        r: rank.
        init: True for N(0, std²); "zeros"; False for N(0, 1/r), clearly not the identity, for tests.
        std: standard deviation of the first.
        seed: seed of the configuration.
        key: name of the module, so that modules differ.
        dtype: of the result.

    Source: the reference implementation of LoRA-XS (Bałazy et al. 2024) draws R from N(0, 1e-5²).
    """
    if init == "zeros":
        return torch.zeros(r, r, dtype=dtype)
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    sigma = std if init is True else r**-0.5
    return (torch.randn(r, r, generator=generator, dtype=torch.float32, device="cpu") * sigma).to(dtype)


def _same(new: Tensor, old: Tensor | None) -> bool:
    if old is None or old.device.type == "meta" or new.shape != old.shape:
        return False
    return torch.equal(new.to(old), old)
