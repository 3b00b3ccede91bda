"""What one adapter trains in one layer, and the sketch of the basis it belongs to."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .sharding import assign

InitWeights = bool | Literal["zeros", "uniform"]

SKETCH_ROWS = 5


class Core(nn.Module):
    """What an adapter trains in one layer, with the sketch of the basis it belongs to.

    In a state dict it is `loraxs_R.<adapter>.sketch`, and `.a`, `.bt` when the basis is kept with the adapter, beside
    what a subclass adds. R means nothing without its basis, so `settled` tells whether the sketch was compared with the
    layer's basis since it last came in from outside; the layer refuses to compute with a core that is not settled.

    Args:
        rank: r.
        basis_shape: (K, N) to keep the basis with the adapter, None to keep its sketch only.
        dtype: of what is trained, and of a basis that is loaded.
        stack: (E,) for a stack of E matrices R, each with a basis and a sketch of its own; () for one.
    """

    # What tells, in a state dict, that another adapter came in.
    identity: tuple[str, ...] = ("sketch", "a", "bt")

    def __init__(
        self, rank: int, basis_shape: tuple[int, int] | None, dtype: torch.dtype, stack: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.settled = False
        # NaN marks what was not recorded yet. `sketch` is a property, so it goes past register_buffer's name check.
        self._buffers["sketch"] = torch.full((*stack, SKETCH_ROWS, rank), torch.nan)
        if basis_shape is not None:
            self.register_buffer("a", torch.full((*stack, rank, basis_shape[0]), torch.nan, dtype=dtype))
            self.register_buffer("bt", torch.full((*stack, rank, basis_shape[1]), torch.nan, dtype=dtype))

    @property
    def rank(self) -> int:
        """r."""
        return self.recorded_sketch.shape[-1]

    def matrix(self) -> Tensor:
        """R [r, r], differentiable in what the adapter trains."""
        raise NotImplementedError

    @property
    def on_basis(self) -> Tensor:
        """[..., r, r], what R is linear in, as it stands on the basis that was recorded."""
        raise NotImplementedError

    def place(self, moved: Tensor) -> None:
        """Take over `on_basis`, expressed on the basis of the layer."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where that is which the adapter trains; "meta" until it was loaded."""
        raise NotImplementedError

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
    def stored_basis(self) -> tuple[Tensor, Tensor] | None:
        """a [r, K] and bt [r, N] that came with R; None if none are kept, or none were recorded yet."""
        a, bt = self._buffers.get("a"), self._buffers.get("bt")
        if a is None or bt is None or not (a.isfinite().all() and bt.isfinite().all()):
            return None
        return a, bt

    @torch.no_grad()
    def record(self, sketch: Tensor, a: Tensor, bt: Tensor) -> None:
        """Note which basis R belongs to from now on: sketch [5, r], a [r, K], bt [r, N]."""
        self._buffers["sketch"] = sketch.to(self.device, torch.float32).contiguous()
        if "a" in self._buffers:
            # Copies: the layer's basis may grow and move without this adapter.
            self._buffers["a"], self._buffers["bt"] = a.clone(), bt.clone()
        self.settled = True

    def forget_basis(self) -> None:
        """Keep the sketch of the basis only."""
        for name in ("a", "bt"):
            self._buffers.pop(name, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = {name: state_dict.get(prefix + name) for name in self.identity}
        if any(new is not None and not _same(new, self._buffers.get(name)) for name, new in loaded.items()):
            self.settled = False
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Core:
        sketch = self.recorded_sketch
        super()._apply(fn, recurse)
        moved = self.recorded_sketch
        if moved.dtype != torch.float32:
            # A measurement, not a weight: rounding it to the model's dtype would blind the comparison.
            self._buffers["sketch"] = sketch.to(moved.device)
        return self


class CoreMatrix(Core):
    """The trainable R [r, r] of LoRA-XS, or a stack [E, r, r]; in a state dict `loraxs_R.<adapter>.weight`.

    Args:
        weight: [r, r] or [E, r, r], initial value of R.
        basis_shape: (K, N) to keep the basis with the adapter, None to keep its sketch only.
    """

    def __init__(self, weight: Tensor, basis_shape: tuple[int, int] | None = None) -> None:
        super().__init__(weight.shape[-1], basis_shape, weight.dtype, tuple(weight.shape[:-2]))
        self.weight = nn.Parameter(weight)

    def matrix(self) -> Tensor:
        """R [r, r]."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def on_basis(self) -> Tensor:
        """R itself."""
        return self.weight

    def place(self, moved: Tensor) -> None:
        """R = `moved` [r, r]."""
        if moved is not self.weight:
            assign(self.weight, moved)

    @property
    def device(self) -> torch.device:
        """That of R."""
        return self.weight.device


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
    generator = seeded_generator(seed, key)
    sigma = std if init is True else r**-0.5
    return (torch.randn(r, r, generator=generator, dtype=torch.float32, device="cpu") * sigma).to(dtype)


def seeded_generator(seed: int, key: str) -> torch.Generator:
    """Random numbers on the CPU that depend on a seed and the name of a module."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _same(new: Tensor, old: Tensor | None) -> bool:
    if old is None or old.device.type == "meta" or new.shape != old.shape:
        return False
    return torch.equal(new.to(old), old)
